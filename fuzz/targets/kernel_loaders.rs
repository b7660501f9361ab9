//! libFuzzer's entry to the target of this name.
#![no_main]

libfuzzer_sys::fuzz_target!(
    |data: &[u8]| (bascule_fuzz::Target::named("kernel_loaders").run)(data)
);
