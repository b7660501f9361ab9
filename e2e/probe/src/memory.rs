//! The memory check: a part of RAM that is filled once and verified continuously, and a part that
//! is rewritten continuously, each page verified before.

use bascule_probe_wire::guest_report::Report;
use bascule_probe_wire::options::Options;
use bascule_probe_wire::pattern::{PAGE_WORDS, check_page, fill_page};

use crate::serial::Console;

/// The pages under check: first the filled ones, then the rewritten ones.
pub(crate) struct Memory {
    base: u64,
    pages_max: u64,
    filled: Area,
    dirty: Area,
    rate_pages: Option<u64>,
    /// Start of the rate's period, and the pages rewritten since.
    rate_start_us: u64,
    rate_done: u64,
    next_check_us: u64,
}

#[derive(Clone, Copy, Debug, Default)]
struct Area {
    first: u64,
    pages: u64,
    next: u64,
    /// The sweep that is under way, from 1. Pages below `next` are of this sweep, the others of the
    /// one before.
    sweep: u64,
}

impl Memory {
    /// The memory from 16 MiB to the end of `ram` (first byte, length).
    pub(crate) fn new(ram: (u64, u64), options: &Options, console: Console) -> Self {
        let end = ram.0 + ram.1;
        let usable = end.saturating_sub(AREA_START + RESERVED_AT_END);
        let pages_max = if ram.0 <= AREA_START {
            usable / PAGE_BYTES
        } else {
            0
        };
        let nothing = Area::default();
        let mut memory = Self {
            base: AREA_START,
            pages_max,
            filled: nothing,
            dirty: nothing,
            rate_pages: None,
            rate_start_us: 0,
            rate_done: 0,
            next_check_us: 0,
        };
        memory.filled.pages = (options.fill_bytes / PAGE_BYTES).min(pages_max);
        memory.filled.sweep = 1;
        memory.configure(options, 0, console);
        memory
    }

    /// Starts over with the rewritten part. The filled part stays as it was at boot.
    pub(crate) fn configure(&mut self, options: &Options, now_us: u64, console: Console) {
        let wanted = options.dirty_bytes / PAGE_BYTES;
        let room = self.pages_max - self.filled.pages;
        if wanted > room || options.fill_bytes / PAGE_BYTES > self.pages_max {
            console.line(format_args!(
                "bad: memory has room for {} pages only",
                self.pages_max
            ));
        }
        let pages = wanted.min(room);
        if pages != self.dirty.pages {
            self.dirty = Area {
                first: self.filled.pages,
                pages,
                next: 0,
                sweep: 1,
            };
        }
        self.rate_pages = options
            .dirty_rate_bytes
            .map(|bytes| bytes.div_ceil(PAGE_BYTES));
        self.rate_start_us = now_us;
        self.rate_done = 0;
    }

    /// One short slice of work.
    pub(crate) fn poll(&mut self, now_us: u64, report: &mut Report, console: Console) {
        if self.filled.pages > 0 {
            if self.filled.sweep == 1 {
                self.fill_slice(console);
            } else if now_us >= self.next_check_us {
                self.next_check_us = now_us + CHECK_PERIOD_US;
                self.check_slice(report, console);
            }
        }
        for _ in 0..self.allowed_pages(now_us) {
            self.rewrite_page(report, console);
        }
    }

    /// How many pages may be rewritten now.
    fn allowed_pages(&mut self, now_us: u64) -> u64 {
        if self.dirty.pages == 0 {
            return 0;
        }
        let Some(rate) = self.rate_pages else {
            return SLICE_PAGES;
        };
        let elapsed_us = now_us.saturating_sub(self.rate_start_us);
        let due = elapsed_us.saturating_mul(rate) / 1_000_000;
        let pages = due.saturating_sub(self.rate_done).min(SLICE_PAGES);
        self.rate_done += pages;
        // After a pause the guest does not make up for the pages it missed.
        if due > self.rate_done + rate {
            self.rate_start_us = now_us;
            self.rate_done = 0;
        }
        pages
    }

    fn rewrite_page(&mut self, report: &mut Report, console: Console) {
        let Area {
            first,
            next: index,
            sweep,
            ..
        } = self.dirty;
        let page = self.page(first + index);
        if sweep > 1 && !check_page(page, index, sweep - 1) {
            report.mem_bad += 1;
            if report.mem_bad <= LINES_MAX {
                let found = page[0];
                console.line(format_args!(
                    "bad: page {index} is not of sweep {}: {found:#x}",
                    sweep - 1
                ));
            }
        }
        fill_page(page, index, sweep);
        report.mem_pages += 1;
        self.dirty.advance();
    }

    fn fill_slice(&mut self, console: Console) {
        for _ in 0..SLICE_PAGES {
            let index = self.filled.next;
            fill_page(self.page(index), index, FILL_SWEEP);
            self.filled.advance();
            if self.filled.sweep > 1 {
                console.line(format_args!("memory filled pages={}", self.filled.pages));
                return;
            }
        }
    }

    fn check_slice(&mut self, report: &mut Report, console: Console) {
        for _ in 0..SLICE_PAGES {
            let index = self.filled.next;
            report.mem_checked += 1;
            if !check_page(self.page(index), index, FILL_SWEEP) {
                report.mem_bad += 1;
                if report.mem_bad <= LINES_MAX {
                    console.line(format_args!("bad: filled page {index} changed"));
                }
            }
            self.filled.advance();
        }
    }

    fn page(&mut self, index: u64) -> &mut [u64; PAGE_WORDS] {
        assert!(index < self.pages_max, "the page lies in RAM");
        let address = self.base + index * PAGE_BYTES;
        // SAFETY: the page lies in RAM that the loader reported, above the image and below what the
        // loader left at the end; only this module touches it, one reference at a time.
        unsafe { &mut *(address as usize as *mut [u64; PAGE_WORDS]) }
    }
}

impl Area {
    fn advance(&mut self) {
        self.next += 1;
        if self.next == self.pages {
            self.next = 0;
            self.sweep += 1;
        }
    }
}

const PAGE_BYTES: u64 = 4096;
/// Above the image, the arena and the loader's structures.
const AREA_START: u64 = 16 << 20;
/// Firmware and loaders put tables at the end of RAM.
const RESERVED_AT_END: u64 = 1 << 20;
/// Pages per slice: about 20 µs.
const SLICE_PAGES: u64 = 16;
const CHECK_PERIOD_US: u64 = 1000;
const FILL_SWEEP: u64 = u64::MAX >> 24;
const LINES_MAX: u64 = 20;
