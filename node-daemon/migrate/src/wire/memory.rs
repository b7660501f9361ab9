//! `Memory` frames: runs of pages, zero or with contents.

use super::cursor::{Cursor, Put};
use super::error::WireError;
use super::kind::FrameKind;
use super::limits::{MEMORY_DATA_BYTES_MAX, MEMORY_RUNS_MAX, RUN_BYTES};
use crate::pages::{PAGE_BYTES, PageIndex, PageRange, Pages};

/// A page's size as a length in memory.
#[expect(clippy::cast_possible_truncation, reason = "4096")]
pub const PAGE: usize = PAGE_BYTES as usize;
/// The size of what stands before the runs.
const HEAD_BYTES: usize = 8;
const KIND_ZERO: u32 = 0;
const KIND_DATA: u32 = 1;

/// What a run of pages contains.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RunContents<'a> {
    /// Only zeroes.
    Zero,
    /// These bytes; as many as the run's pages have.
    Data(&'a [u8]),
}

/// A checked `Memory` body: every run is a valid range, and the contents are complete. Whether
/// the ranges are the machine's memory is for the receiver to check, who knows its layout.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Batch<'a> {
    table: &'a [u8],
    data: &'a [u8],
}

/// The runs of a [`Batch`], in the order in which they were sent.
#[derive(Clone, Debug)]
pub struct Runs<'a> {
    table: &'a [u8],
    data: &'a [u8],
}

impl<'a> Batch<'a> {
    pub(super) fn decode(body: &'a [u8]) -> Result<Self, WireError> {
        let mut cursor = Cursor::new(FrameKind::Memory, body);
        let count = usize::try_from(cursor.u32()?).unwrap_or(usize::MAX);
        cursor.reserved(4)?;
        if count == 0 || count > MEMORY_RUNS_MAX {
            return Err(cursor.malformed("a batch has 1 to 4096 runs"));
        }
        let table = cursor.bytes(count * RUN_BYTES)?;
        let data = cursor.rest();
        let mut wanted = 0u64;
        for entry in table.chunks_exact(RUN_BYTES) {
            let (range, kind) = entry_of(entry).ok_or_else(|| cursor.malformed("bad run"))?;
            match kind {
                KIND_ZERO => {}
                KIND_DATA => wanted += range.bytes().0,
                _ => return Err(cursor.malformed("unknown kind of run")),
            }
        }
        if u64::try_from(data.len()).ok() != Some(wanted) {
            return Err(cursor.malformed("the contents do not match the runs"));
        }
        Ok(Self { table, data })
    }

    /// The runs of pages, in the order of the table.
    #[must_use]
    pub const fn runs(&self) -> Runs<'a> {
        Runs {
            table: self.table,
            data: self.data,
        }
    }
}

impl<'a> Iterator for Runs<'a> {
    type Item = (PageRange, RunContents<'a>);

    fn next(&mut self) -> Option<Self::Item> {
        let (entry, table) = self.table.split_at_checked(RUN_BYTES)?;
        let (range, kind) = entry_of(entry)?;
        self.table = table;
        if kind == KIND_ZERO {
            return Some((range, RunContents::Zero));
        }
        let length = usize::try_from(range.bytes().0).ok()?;
        let (contents, data) = self.data.split_at_checked(length)?;
        self.data = data;
        Some((range, RunContents::Data(contents)))
    }
}

/// Collects runs until a frame is full. Reused frame after frame, so that sending allocates
/// nothing.
#[derive(Debug)]
pub struct BatchBuilder {
    runs: Vec<(PageRange, u32)>,
    data: Vec<u8>,
    head: Vec<u8>,
}

impl Default for BatchBuilder {
    fn default() -> Self {
        Self::new()
    }
}

impl BatchBuilder {
    /// An empty builder, with room for a full frame.
    #[must_use]
    pub fn new() -> Self {
        Self {
            runs: Vec::with_capacity(MEMORY_RUNS_MAX),
            data: Vec::with_capacity(MEMORY_DATA_BYTES_MAX),
            head: Vec::with_capacity(HEAD_BYTES + MEMORY_RUNS_MAX * RUN_BYTES),
        }
    }

    /// Adds a run of zero pages, and says whether it fitted.
    #[must_use]
    pub fn push_zero(&mut self, range: PageRange) -> bool {
        self.push(range, KIND_ZERO)
    }

    /// Adds one page and its place for the contents, which `fill` writes; says whether it fitted.
    /// `fill` is not called for a page that does not fit.
    #[must_use]
    pub fn push_page(&mut self, page: PageIndex, fill: impl FnOnce(&mut [u8; PAGE])) -> bool {
        let Ok(range) = PageRange::new(page, Pages(1)) else {
            return false;
        };
        if self.data.len() + PAGE > MEMORY_DATA_BYTES_MAX || !self.push(range, KIND_DATA) {
            return false;
        }
        let start = self.data.len();
        self.data.resize(start + PAGE, 0);
        if let Some(place) = self.data.last_chunk_mut::<PAGE>() {
            fill(place);
        }
        true
    }

    fn push(&mut self, range: PageRange, kind: u32) -> bool {
        if let Some((last, last_kind)) = self.runs.last_mut()
            && *last_kind == kind
            && last.end() == range.first()
            && let Some(pages) = last.pages().0.checked_add(range.pages().0)
            && u32::try_from(pages).is_ok()
            && let Ok(longer) = PageRange::new(last.first(), Pages(pages))
        {
            *last = longer;
            return true;
        }
        if self.runs.len() >= MEMORY_RUNS_MAX || u32::try_from(range.pages().0).is_err() {
            return false;
        }
        self.runs.push((range, kind));
        true
    }

    /// Whether nothing was added.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    /// The frame's body, as the two parts that follow each other.
    pub fn parts(&mut self) -> (&[u8], &[u8]) {
        self.head.clear();
        // At most MEMORY_RUNS_MAX.
        self.head
            .put_u32(u32::try_from(self.runs.len()).unwrap_or(u32::MAX));
        self.head.put_zeroes(4);
        for (range, kind) in &self.runs {
            self.head.put_u64(range.first().0);
            self.head
                .put_u32(u32::try_from(range.pages().0).unwrap_or(u32::MAX));
            self.head.put_u32(*kind);
        }
        (&self.head, &self.data)
    }

    /// Forgets the runs and keeps the room.
    pub fn clear(&mut self) {
        self.runs.clear();
        self.data.clear();
    }
}

fn entry_of(entry: &[u8]) -> Option<(PageRange, u32)> {
    let (first, rest) = entry.split_first_chunk::<8>()?;
    let (pages, kind) = rest.split_first_chunk::<4>()?;
    let kind = kind.first_chunk::<4>()?;
    let pages = Pages(u64::from(u32::from_le_bytes(*pages)));
    let range = PageRange::new(PageIndex(u64::from_le_bytes(*first)), pages).ok()?;
    Some((range, u32::from_le_bytes(*kind)))
}
