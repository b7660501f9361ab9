//! `kubectl bascule logs`.

use std::io;

use anyhow::{Context, Result};
use futures::io::AllowStdIo;
use http::Request;
use kube::Client;

use crate::target::Target;

/// Prints the last serial output as it is: it may be no text.
pub(crate) async fn run(client: &Client, target: &Target) -> Result<()> {
    let request = Request::get(target.path("log")).body(Vec::new());
    let request = request.context("make the request")?;
    let output = client.request_stream(request).await;
    let output = output.context("read the serial output")?;
    let mut stdout = AllowStdIo::new(io::stdout());
    futures::io::copy(output, &mut stdout)
        .await
        .context("print")?;
    Ok(())
}
