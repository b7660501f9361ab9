//! Standard output and standard error of the offline tools.

use std::io::{self, Write};

use anyhow::{Context, Result};

/// Writes `text` to standard output. A reader that has gone (`| head`) is no error: a repair goes on.
pub(crate) fn show(text: &str) -> Result<()> {
    show_to(&mut io::stdout().lock(), text)
}

/// Writes a line to standard error, if that can be written to.
pub fn complain(text: &str) {
    // There is nowhere else to say it; the exit code does.
    drop(writeln!(io::stderr().lock(), "{text}"));
}

fn show_to(out: &mut impl Write, text: &str) -> Result<()> {
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        written => written.context("write to standard output"),
    }
}
