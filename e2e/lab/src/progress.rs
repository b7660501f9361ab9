//! Telling the user what is going on and how long it took.

use std::time::Instant;

use anyhow::{Context, Result};

/// Says `what` before, and how long it took after; an error says in which step it happened.
pub fn step<T>(what: &str, body: impl FnOnce() -> Result<T>) -> Result<T> {
    let started = Instant::now();
    say(&format!("{what} ..."));
    let value = body().with_context(|| what.to_owned())?;
    say(&format!(
        "{what}: done in {:.1} s",
        started.elapsed().as_secs_f64()
    ));
    Ok(value)
}

/// One line of progress on standard error; standard output is for results.
pub fn say(line: &str) {
    eprintln!("lab: {line}");
}
