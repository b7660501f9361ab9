//! The pattern that the guest keeps in its memory: every page encodes its index and in which
//! sweep it was written, so a page that a migration lost, duplicated or sent stale is detected.

/// Words in a page.
pub const PAGE_WORDS: usize = 512;

/// Writes page `index` as of sweep `sweep`.
pub fn fill_page(page: &mut [u64; PAGE_WORDS], index: u64, sweep: u64) {
    let base = base_of(index, sweep);
    for (word, value) in page.iter_mut().zip(0..) {
        *word = base.wrapping_add(STEP.wrapping_mul(value));
    }
}

/// Whether page `index` holds exactly what sweep `sweep` wrote.
#[must_use]
pub fn check_page(page: &[u64; PAGE_WORDS], index: u64, sweep: u64) -> bool {
    let base = base_of(index, sweep);
    let differing = page.iter().zip(0..).fold(0, |sum, (word, value)| {
        sum | (word ^ base.wrapping_add(STEP.wrapping_mul(value)))
    });
    differing == 0
}

/// A cheap bijective mixer (the finalizer of splitmix64).
#[must_use]
pub const fn mix(value: u64) -> u64 {
    let mut z = value.wrapping_add(STEP);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

const fn base_of(index: u64, sweep: u64) -> u64 {
    mix(index ^ sweep.rotate_left(40))
}

const STEP: u64 = 0x9e37_79b9_7f4a_7c15;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_is_recognised_only_as_itself_in_its_sweep() {
        let mut page = [0; PAGE_WORDS];
        fill_page(&mut page, 5, 3);
        assert!(check_page(&page, 5, 3));
        assert!(!check_page(&page, 5, 2), "stale");
        assert!(!check_page(&page, 6, 3), "another page");
        page[511] ^= 1;
        assert!(!check_page(&page, 5, 3), "damaged");
    }
}
