//! What ranks send each other: frames of bounded length.

use std::io::{Error, ErrorKind, Read, Result, Write};
use std::sync::Arc;

/// The first bytes of every connection, by which strangers are recognised.
pub(super) const MAGIC: [u8; 8] = *b"ETTRANKS";
/// Version of everything that is sent. Both ends of a connection have the same one.
pub(super) const VERSION: u32 = 1;
/// Longest body of a frame.
pub(super) const LONGEST: usize = 1 << 30;
/// Longest body of a frame of someone who is not known yet.
pub(super) const LONGEST_HELLO: usize = 4096;

/// What a frame says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Kind {
    /// A rank introduces itself.
    Hello = 1,
    /// All ranks are there; the body has their hosts.
    Welcome,
    /// The rank is not let in; the body says why.
    Refused,
    /// A sign of life.
    Pulse,
    /// Phase (the tag) and place in the run.
    State,
    /// A rank's part of a call (the tag).
    Part,
    /// The result of a call (the tag).
    Whole,
    /// To rank 0: why the sender has failed. From rank 0: the sentence with which the group has ended.
    Fail,
    /// The sender leaves.
    Leave,
    /// The last words of the receiver have arrived.
    Bye,
}

impl Kind {
    fn of(byte: u8) -> Option<Self> {
        use Kind::*;
        let all = [Hello, Welcome, Refused, Pulse, State, Part, Whole, Fail, Leave, Bye];
        all.into_iter().find(|k| *k as u8 == byte)
    }
}

/// One message.
#[derive(Debug, Clone)]
pub(super) struct Frame {
    pub(super) kind: Kind,
    pub(super) tag: u8,
    pub(super) body: Arc<Vec<u8>>,
}

impl Frame {
    pub(super) fn new(kind: Kind, tag: u8, body: Vec<u8>) -> Self {
        Frame { kind, tag, body: Arc::new(body) }
    }

    pub(super) fn text(kind: Kind, text: &str) -> Self {
        Self::new(kind, 0, text.as_bytes().to_vec())
    }

    /// The body as text.
    pub(super) fn as_text(&self) -> String {
        shown(&String::from_utf8_lossy(&self.body))
    }

    /// Writes the frame, with one call of the system if it is short.
    pub(super) fn write(&self, to: &mut impl Write) -> Result<()> {
        let short = self.body.len() <= 1 << 16;
        let mut head = Vec::with_capacity(if short { 6 + self.body.len() } else { 6 });
        head.extend([self.kind as u8, self.tag]);
        head.extend((self.body.len() as u32).to_le_bytes());
        if short {
            head.extend_from_slice(&self.body);
            return to.write_all(&head);
        }
        to.write_all(&head)?;
        to.write_all(&self.body)
    }

    /// Reads a frame whose body has at most `longest` bytes. Memory is taken as bytes arrive, whatever length is announced.
    pub(super) fn read(from: &mut impl Read, longest: usize) -> Result<Self> {
        let mut head = [0; 6];
        from.read_exact(&mut head)?;
        let [kind, tag, length @ ..] = head;
        let kind = Kind::of(kind).ok_or_else(|| Error::new(ErrorKind::InvalidData, "an unknown message"))?;
        let length = u32::from_le_bytes(length) as usize;
        if length > longest {
            let what = format!("a message of {length} bytes, wanted at most {longest}");
            return Err(Error::new(ErrorKind::InvalidData, what));
        }
        let mut body = Vec::with_capacity(length.min(1 << 16));
        if from.take(length as u64).read_to_end(&mut body)? < length {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        Ok(Self::new(kind, tag, body))
    }
}

/// The first bytes of a connection and its first frame.
pub(super) fn greet(to: &mut impl Write, frame: &Frame) -> Result<()> {
    let mut bytes = MAGIC.to_vec();
    bytes.extend(VERSION.to_le_bytes());
    frame.write(&mut bytes)?;
    to.write_all(&bytes)
}

/// Reads what [`greet`] wrote: the version of the other side, and its frame if the version is ours. `None` for a stranger.
pub(super) fn greeted(from: &mut impl Read, longest: usize) -> Result<Option<(u32, Option<Frame>)>> {
    let (mut magic, mut version) = ([0; 8], [0; 4]);
    from.read_exact(&mut magic)?;
    if magic != MAGIC {
        return Ok(None);
    }
    from.read_exact(&mut version)?;
    let version = u32::from_le_bytes(version);
    let frame = if version == VERSION { Some(Frame::read(from, longest)?) } else { None };
    Ok(Some((version, frame)))
}

/// Appends bytes and their length.
pub(super) fn put(to: &mut Vec<u8>, bytes: &[u8]) {
    to.extend((bytes.len() as u64).to_le_bytes());
    to.extend_from_slice(bytes);
}

/// What [`put`] appended, in the same order.
pub(super) struct Fields<'a>(pub(super) &'a [u8]);

impl<'a> Fields<'a> {
    pub(super) fn number(&mut self) -> Option<u64> {
        let (number, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(u64::from_le_bytes(*number))
    }

    pub(super) fn bytes(&mut self) -> Option<&'a [u8]> {
        let length = usize::try_from(self.number()?).ok()?;
        let (bytes, rest) = self.0.split_at_checked(length)?;
        self.0 = rest;
        Some(bytes)
    }

    pub(super) fn text(&mut self) -> Option<String> {
        Some(shown(&String::from_utf8_lossy(self.bytes()?)))
    }
}

/// A text of another process as part of a sentence: one line, at most 2000 characters.
pub(super) fn shown(text: &str) -> String {
    text.chars().take(2000).map(|c| if c.is_control() { ' ' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_come_back() {
        for length in [0, 1, 1 << 16, (1 << 16) + 1] {
            let mut bytes = Vec::new();
            let body: Vec<u8> = (0..length).map(|i| i as u8).collect();
            Frame::new(Kind::Part, 3, body.clone()).write(&mut bytes).unwrap();
            let frame = Frame::read(&mut &bytes[..], LONGEST).unwrap();
            assert_eq!((frame.kind, frame.tag, &*frame.body), (Kind::Part, 3, &body));
            assert!(Frame::read(&mut &bytes[..bytes.len() - 1], LONGEST).is_err());
        }
    }

    #[test]
    fn nonsense_is_refused() {
        let mut long = vec![Kind::Part as u8, 0];
        long.extend(u32::MAX.to_le_bytes());
        assert!(Frame::read(&mut &long[..], LONGEST).unwrap_err().to_string().contains("4294967295 bytes"));
        assert!(Frame::read(&mut &[99, 0, 0, 0, 0, 0][..], LONGEST).is_err());
        assert!(greeted(&mut &b"GET / HTTP/1.1\r\n"[..], LONGEST_HELLO).unwrap().is_none());
        let mut other = MAGIC.to_vec();
        other.extend(7u32.to_le_bytes());
        assert!(matches!(greeted(&mut &other[..], LONGEST_HELLO), Ok(Some((7, None)))));
        assert!(Fields(&[255; 8]).bytes().is_none());
    }
}
