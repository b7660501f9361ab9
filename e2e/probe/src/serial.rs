//! The console: lines written to the serial port at 0x3F8, and echoed from it, no interrupts, no waiting.

use core::fmt::{self, Write};

use crate::port;

#[derive(Clone, Copy, Debug)]
pub(crate) struct Console {
    string_io: bool,
}

impl Console {
    /// The console, written by string I/O or byte by byte.
    pub(crate) const fn new(string_io: bool) -> Self {
        Self { string_io }
    }

    /// Writes one line.
    pub(crate) fn line(self, text: fmt::Arguments<'_>) {
        let mut line = Text::<LINE_BYTES_MAX>::new();
        // A line that does not fit is cut: the reader sees that it is no whole record.
        let fits = writeln!(line, "{text}").is_ok();
        if !fits {
            line.bytes[LINE_BYTES_MAX - 1] = b'\n';
        }
        if self.string_io {
            port::write_string(COM1, line.as_bytes());
        } else {
            for &byte in line.as_bytes() {
                port::write8(COM1, byte);
            }
        }
    }
}

/// What is typed on the console, line by line.
#[derive(Debug)]
pub(crate) struct Typed(Text<TYPED_BYTES_MAX>);

impl Typed {
    pub(crate) const fn new() -> Self {
        Self(Text::new())
    }

    /// Reads what has arrived, and writes each line that is complete as `echo: LINE`.
    pub(crate) fn echo(&mut self, console: Console) {
        while port::read8(COM1 + LINE_STATUS) & DATA_READY != 0 {
            let byte = port::read8(COM1);
            if byte == b'\r' || byte == b'\n' {
                console.line(format_args!("echo: {}", self.0.as_str()));
                self.0 = Text::new();
            } else {
                self.0.push(byte);
            }
        }
    }
}

/// A text of bounded length, without allocation.
#[derive(Debug)]
pub(crate) struct Text<const N: usize> {
    bytes: [u8; N],
    length: usize,
}

impl<const N: usize> Text<N> {
    pub(crate) const fn new() -> Self {
        Self {
            bytes: [0; N],
            length: 0,
        }
    }

    pub(crate) fn as_bytes(&self) -> &[u8] {
        &self.bytes[..self.length]
    }

    /// The text, empty when it is none.
    pub(crate) fn as_str(&self) -> &str {
        core::str::from_utf8(self.as_bytes()).unwrap_or_default()
    }

    /// Adds one byte, if there is room.
    pub(crate) fn push(&mut self, byte: u8) {
        if let Some(place) = self.bytes.get_mut(self.length) {
            *place = byte;
            self.length += 1;
        }
    }
}

impl<const N: usize> Write for Text<N> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let room = N - self.length;
        let taken = text.len().min(room);
        self.bytes[self.length..self.length + taken].copy_from_slice(&text.as_bytes()[..taken]);
        self.length += taken;
        if taken == text.len() {
            Ok(())
        } else {
            Err(fmt::Error)
        }
    }
}

const COM1: u16 = 0x3f8;
/// The line status register of a 16550A, from its first port.
const LINE_STATUS: u16 = 5;
const DATA_READY: u8 = 1;
const TYPED_BYTES_MAX: usize = 128;
const LINE_BYTES_MAX: usize = 512;
