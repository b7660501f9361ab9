//! Logging set-up.

use anyhow::{Context, Result};
use tracing_subscriber::EnvFilter;

use crate::cli::{Args, LogFormat};

/// Installs the global subscriber, which writes to standard error.
pub(crate) fn start(args: &Args) -> Result<()> {
    let filter =
        EnvFilter::try_new(&args.log).with_context(|| format!("read --log {}", args.log))?;
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr);
    match args.log_format {
        LogFormat::Text => builder.with_ansi(false).init(),
        LogFormat::Json => builder.json().init(),
    }
    Ok(())
}
