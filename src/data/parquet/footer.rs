//! A look at the schema in the metadata of a file, before the parquet crate builds it by recursion.

/// Maximum nesting of a schema.
const MAX_DEPTH: usize = 64;
/// Maximum number of elements of a schema: its columns and the groups of them.
const MAX_ELEMENTS: u64 = 10_000;

/// Types of Thrift's compact form.
const I32: u8 = 5;
const I64: u8 = 6;
const BINARY: u8 = 8;
const LIST: u8 = 9;
const STRUCT: u8 = 12;
/// The types of the fields of the metadata and of an element of its schema, from field 1 on. The crate reads these fields
/// by their numbers alone.
const METADATA: [u8; 7] = [I32, LIST, I64, LIST, LIST, BINARY, LIST];
const ELEMENT: [u8; 10] = [I32, I32, I32, BINARY, I32, I32, I32, I32, I32, STRUCT];

type Told<T> = Result<T, String>;

/// Refuses metadata whose schema is nested too deeply, is too large or cannot be followed.
pub(super) fn check(metadata: &[u8]) -> Told<()> {
    let mut bytes = Compact(metadata);
    let mut last = 0;
    while let Some((id, kind)) = bytes.field(last, &METADATA)? {
        match id {
            2 => schema(&mut bytes)?,
            _ => bytes.skip(kind, 0)?,
        }
        last = id;
    }
    Ok(())
}

/// Checks the list of the elements of a schema: each group stands before its members.
fn schema(bytes: &mut Compact) -> Told<()> {
    let (kind, count) = bytes.list()?;
    if count > 0 && kind != STRUCT {
        return Err(damaged());
    }
    if count > MAX_ELEMENTS {
        return Err(format!("its schema has {count} elements, wanted at most {MAX_ELEMENTS}"));
    }
    // Members that are still to come, of each group around the next element.
    let mut open: Vec<i32> = Vec::new();
    for _ in 0..count {
        if let Some(left) = open.last_mut() {
            *left -= 1;
        }
        let (mut last, mut members) = (0, 0);
        while let Some((id, kind)) = bytes.field(last, &ELEMENT)? {
            match id {
                5 => members = bytes.number()? as i32,
                _ => bytes.skip(kind, 0)?,
            }
            last = id;
        }
        if members > 0 {
            open.push(members);
        }
        if open.len() > MAX_DEPTH {
            return Err(format!("its schema is nested more than {MAX_DEPTH} deep"));
        }
        while open.pop_if(|left| *left == 0).is_some() {}
    }
    Ok(())
}

fn damaged() -> String {
    "its metadata cannot be read (the schema is damaged)".into()
}

/// Reads values in Thrift's compact form.
struct Compact<'a>(&'a [u8]);

impl Compact<'_> {
    fn byte(&mut self) -> Told<u8> {
        let (first, rest) = self.0.split_first().ok_or_else(damaged)?;
        self.0 = rest;
        Ok(*first)
    }

    fn pass(&mut self, n: u64) -> Told<()> {
        let n = usize::try_from(n).map_err(|_| damaged())?;
        self.0 = self.0.get(n..).ok_or_else(damaged)?;
        Ok(())
    }

    fn varint(&mut self) -> Told<u64> {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            value |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Ok(value);
            }
        }
        Err(damaged())
    }

    /// A signed number.
    fn number(&mut self) -> Told<i64> {
        let zigzag = self.varint()?;
        Ok((zigzag >> 1) as i64 ^ -((zigzag & 1) as i64))
    }

    /// The number and the type of the next field of a struct, after field `last`; `None` at its end. The fields of
    /// `known` must have the types in it.
    fn field(&mut self, last: i16, known: &[u8]) -> Told<Option<(i16, u8)>> {
        let byte = self.byte()?;
        let (delta, kind) = (i16::from(byte >> 4), byte & 15);
        if kind == 0 {
            return Ok(None);
        }
        let id = match delta {
            0 => self.number()? as i16,
            _ => last.checked_add(delta).ok_or_else(damaged)?,
        };
        let wanted = usize::try_from(i32::from(id) - 1).ok().and_then(|i| known.get(i));
        match wanted.is_none_or(|&w| w == kind) {
            true => Ok(Some((id, kind))),
            false => Err(damaged()),
        }
    }

    /// The type and the number of the elements of a list.
    fn list(&mut self) -> Told<(u8, u64)> {
        let byte = self.byte()?;
        let count = match byte >> 4 {
            15 => self.varint()?,
            n => n.into(),
        };
        Ok((byte & 15, count))
    }

    /// Passes over a value.
    fn skip(&mut self, kind: u8, depth: usize) -> Told<()> {
        if depth > MAX_DEPTH {
            return Err(damaged());
        }
        match kind {
            // Booleans, in the header of their field.
            1 | 2 => Ok(()),
            3 => self.pass(1),
            4..=6 => self.varint().map(|_| ()),
            7 => self.pass(8),
            BINARY => {
                let n = self.varint()?;
                self.pass(n)
            }
            // Lists and sets.
            LIST | 10 => {
                let (kind, count) = self.list()?;
                (0..count).try_for_each(|_| self.element(kind, depth))
            }
            // Maps.
            11 => match self.varint()? {
                0 => Ok(()),
                count => {
                    let kinds = self.byte()?;
                    (0..count).try_for_each(|_| {
                        self.element(kinds >> 4, depth)?;
                        self.element(kinds & 15, depth)
                    })
                }
            },
            STRUCT => {
                let mut last = 0;
                while let Some((id, kind)) = self.field(last, &[])? {
                    self.skip(kind, depth + 1)?;
                    last = id;
                }
                Ok(())
            }
            _ => Err(damaged()),
        }
    }

    /// Passes over an element of a list or a map: a boolean is a byte there.
    fn element(&mut self, kind: u8, depth: usize) -> Told<()> {
        match kind {
            1 | 2 => self.pass(1),
            kind => self.skip(kind, depth + 1),
        }
    }
}
