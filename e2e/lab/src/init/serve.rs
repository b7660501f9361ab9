//! The node's end of the control connection.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::system::{RebootCommand, reboot};

use super::NodeSpec;
use super::device_names::port_by_name;
use super::supervisor::Supervisor;
use crate::command::named_thread;
use crate::config::NODE_CONF;
use crate::control::{Op, Reply, Request, Response};
use crate::state::Tier;

/// Name of the control socket in the node's configuration directory, and of the virtio port.
pub(crate) const CONTROL: &str = "control";

/// Serves requests until the node ends.
pub(crate) fn serve(spec: &NodeSpec, supervisor: &Supervisor) -> Result<()> {
    match spec.tier {
        Tier::Native => serve_socket(supervisor),
        Tier::Emulated => serve_port(supervisor),
    }
}

fn serve_socket(supervisor: &Supervisor) -> Result<()> {
    let path = Path::new(NODE_CONF).join(CONTROL);
    // A stale socket from before a power cut.
    drop(std::fs::remove_file(&path));
    let listener = UnixListener::bind(&path).context("listen for the lab")?;
    for stream in listener.incoming() {
        let stream = stream.context("accept the lab")?;
        let writer = stream.try_clone().context("duplicate a connection")?;
        let supervisor = supervisor.clone();
        named_thread("control", move || answer_all(stream, writer, &supervisor))?;
    }
    Ok(())
}

/// A virtio port can be opened once only. A read returns end-of-file while no client is connected.
fn serve_port(supervisor: &Supervisor) -> Result<()> {
    let path = port_by_name(CONTROL)?;
    let open = || OpenOptions::new().read(true).write(true).open(&path);
    let port: File = open().with_context(|| format!("open {}", path.display()))?;
    loop {
        let reader = port.try_clone().context("duplicate the port")?;
        let writer = port.try_clone().context("duplicate the port")?;
        answer_all(reader, writer, supervisor);
        std::thread::sleep(PORT_PAUSE);
    }
}

/// Each request runs in its own thread, so that a long one does not delay the others.
fn answer_all(reader: impl Read, writer: impl Write + Send + 'static, supervisor: &Supervisor) {
    let writer = Arc::new(Mutex::new(writer));
    for line in BufReader::new(reader).lines().map_while(Result::ok) {
        let Ok(request) = serde_json::from_str::<Request>(&line) else {
            continue;
        };
        let (writer, supervisor) = (Arc::clone(&writer), supervisor.clone());
        let answered = named_thread("answer", move || {
            let result = perform(request.op, &supervisor).map_err(|error| format!("{error:#}"));
            let response = Response {
                id: request.id,
                result,
            };
            let Ok(mut bytes) = serde_json::to_vec(&response) else {
                return;
            };
            bytes.push(b'\n');
            // The client may have disconnected.
            drop(
                writer
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .write_all(&bytes),
            );
        });
        if let Err(error) = answered {
            eprintln!("node-init: {error:#}");
        }
    }
}

fn perform(op: Op, supervisor: &Supervisor) -> Result<Reply> {
    match op {
        Op::Status => Ok(Reply::Status {
            started: supervisor.started(),
            services: supervisor.services(),
        }),
        Op::Exec {
            argv,
            stdin,
            deadline_s,
        } => supervisor
            .exec(&argv, stdin, Duration::from_secs(deadline_s))
            .map(Reply::Exec),
        Op::Start { service } => supervisor.start(&service).map(|()| Reply::Done),
        Op::Stop { service } => supervisor.stop(&service).map(|()| Reply::Done),
        Op::Signal { service, signal } => supervisor.signal(&service, signal).map(|()| Reply::Done),
        Op::PowerOff => {
            rustix::fs::sync();
            // In a PID namespace this ends its init, and with it everything in it (reboot(2)).
            reboot(RebootCommand::PowerOff).context("power off")?;
            Ok(Reply::Done)
        }
    }
}

/// Poll interval for the next client of a virtio port, which signals no connection.
const PORT_PAUSE: Duration = Duration::from_millis(50);
