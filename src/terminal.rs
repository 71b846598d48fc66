//! Output of the programs, robust against closed pipes and full disks.

use std::io::{self, BufRead, BufReader, IsTerminal, Read, Write};

use crate::error::{Error, Result};

/// Longest part of a line that is passed on at once.
const LINE: u64 = 1 << 16;

/// Standard output. An error of it does not stop a program that has more to do than to print.
#[derive(Default)]
pub struct Output {
    failed: Option<io::Error>,
}

impl Output {
    /// Writes and flushes text; returns false if this or an earlier write failed.
    pub fn put(&mut self, text: &str) -> bool {
        if self.failed.is_none() {
            let mut out = io::stdout().lock();
            self.failed = out.write_all(text.as_bytes()).and_then(|()| out.flush()).err();
        }
        self.failed.is_none()
    }

    /// Writes a line.
    pub fn line(&mut self, text: impl AsRef<str>) -> bool {
        self.put(&format!("{}\n", text.as_ref()))
    }

    /// Fails if a write failed, unless the reader closed the pipe, as `head` does.
    pub fn finish(self) -> Result<()> {
        match self.failed {
            Some(e) if e.kind() != io::ErrorKind::BrokenPipe => Err(Error::io("standard output")(e)),
            _ => Ok(()),
        }
    }
}

/// Standard error; write errors are ignored.
struct Log;

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let _ = io::stderr().write_all(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Logs to standard error the events selected by `ETT_LOG`, by default those of `level` and above.
pub fn log(level: &str) {
    tracing_subscriber::fmt()
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_env("ETT_LOG").unwrap_or_else(|_| level.into()),
        )
        .without_time()
        .with_target(false)
        .with_ansi(io::stderr().is_terminal())
        .with_writer(|| Log)
        .init();
}

/// Prints to standard error why a program failed.
pub fn complain(e: &Error) {
    let _ = writeln!(Log, "error: {e}");
}

/// Prints to standard error what another program prints, until it ends, with `prefix` before each line.
pub fn pass_on(from: impl Read, prefix: &str) {
    pass(from, prefix, &mut Log);
}

fn pass(from: impl Read, prefix: &str, to: &mut impl Write) {
    let mut from = BufReader::new(from);
    let mut line = Vec::new();
    loop {
        line.clear();
        line.extend_from_slice(prefix.as_bytes());
        // In one piece, so that lines of several programs do not mix.
        match from.by_ref().take(LINE).read_until(b'\n', &mut line) {
            Ok(0) | Err(_) => return,
            Ok(_) if line.ends_with(b"\n") => {}
            Ok(_) => line.push(b'\n'),
        }
        let _ = to.write_all(&line);
    }
}

/// The text of a model with control characters replaced, since they could move the terminal's cursor; line breaks and
/// tabs stay.
fn visible(text: &str) -> String {
    let shown = |c: char| if c.is_control() && !matches!(c, '\n' | '\t') { '\u{fffd}' } else { c };
    text.replace("\r\n", "\n").chars().map(shown).collect()
}

/// The text of a model in one line.
pub fn one_line(text: &str) -> String {
    visible(text).split_whitespace().collect::<Vec<_>>().join(" ")
}

/// The text of a model in lines, with at most one empty line in a row and none at the start and end.
pub fn paragraphs(text: &str) -> String {
    let text = visible(text);
    let mut lines: Vec<&str> = text.lines().map(str::trim_end).collect();
    lines.dedup_by(|a, b| a.is_empty() && b.is_empty());
    lines.join("\n").trim().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_of_a_model_do_not_flood_a_terminal() {
        let empty = "\n \n".repeat(9);
        let text = format!("{empty}a  red\r\n{empty}\tsquare\u{1b}[2J{empty}");
        assert_eq!(one_line(&text), "a red square\u{fffd}[2J");
        assert_eq!(paragraphs(&text), "a  red\n\n\tsquare\u{fffd}[2J");
        assert_eq!((paragraphs(&empty), paragraphs("one\ntwo")), (String::new(), "one\ntwo".into()));
    }

    #[test]
    fn lines_are_passed_on_with_their_origin() {
        let passed = |text: &[u8]| {
            let mut out = Vec::new();
            pass(text, "rank 3: ", &mut out);
            out
        };
        assert_eq!(passed(b""), b"");
        assert_eq!(passed(b"a\n\nb"), b"rank 3: a\nrank 3: \nrank 3: b\n");
        assert_eq!(passed(b"\xff\n"), b"rank 3: \xff\n");
        let long = vec![b'x'; LINE as usize + 1];
        assert_eq!(passed(&long).len(), long.len() + 2 * "rank 3: \n".len());
    }
}
