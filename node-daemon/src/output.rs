//! Standard output and standard error of the commands. `println!` and `eprintln!` end the process when the
//! reader has gone.

use std::fmt::Display;
use std::io::{self, Write};

use anyhow::{Context, Result};

/// Writes `text`. A reader that has gone (`| head`) is no error.
pub(crate) fn show(text: &str) -> Result<()> {
    show_to(&mut io::stdout().lock(), text)
}

/// Writes a line to standard error, if that can be written to: nothing ends because nobody is told.
pub(crate) fn tell(text: impl Display) {
    tell_part(format_args!("{text}\n"));
}

/// Like [`tell`], without the end of the line.
pub(crate) fn tell_part(text: impl Display) {
    let mut out = io::stderr().lock();
    drop(write!(out, "{text}").and_then(|()| out.flush()));
}

fn show_to(out: &mut impl Write, text: &str) -> Result<()> {
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        written => written.context("write to standard output"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn output_that_nobody_reads_is_no_error() {
        let (reader, mut writer) = io::pipe().unwrap();
        drop(reader);
        show_to(&mut writer, "VM\n").unwrap();
        let full = std::fs::OpenOptions::new().write(true).open("/dev/full");
        show_to(&mut full.unwrap(), "VM\n").unwrap_err();
    }
}
