//! What the programs say, to readers who may have gone and on disks that may be full.

use std::io::{self, IsTerminal, Write};

use crate::error::{Error, Result};

/// Standard output. Nothing that goes wrong with it stops a program that has more to do than to print.
#[derive(Default)]
pub struct Output {
    failed: Option<io::Error>,
}

impl Output {
    /// Writes text at once; false if it, or something before it, could not be written.
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

    /// Fails if something could not be written, unless its reader has gone, as `head` does.
    pub fn finish(self) -> Result<()> {
        match self.failed {
            Some(e) if e.kind() != io::ErrorKind::BrokenPipe => Err(Error::io("standard output")(e)),
            _ => Ok(()),
        }
    }
}

/// Standard error, where what cannot be written is lost.
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

/// Logs to standard error what `ETT_LOG` asks for, by default events of `level` and above.
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

/// Says on standard error why a program has failed.
pub fn complain(e: &Error) {
    let _ = writeln!(Log, "error: {e}");
}

/// A model's words without what would move the cursor of a terminal; line breaks and tabs stay.
fn visible(text: &str) -> String {
    let shown = |c: char| if c.is_control() && !matches!(c, '\n' | '\t') { '\u{fffd}' } else { c };
    text.replace("\r\n", "\n").chars().map(shown).collect()
}

/// A model's words in one line.
pub fn one_line(text: &str) -> String {
    visible(text).split_whitespace().collect::<Vec<_>>().join(" ")
}

/// A model's words in lines, with at most one empty line between them and none around them.
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
}
