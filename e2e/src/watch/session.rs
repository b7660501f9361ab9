//! A TCP session with the guest. The guest numbers its responses, so that a restart or a lost or
//! repeated request is detected.

use std::io::{BufRead, BufReader, Write};
use std::net::{Ipv4Addr, SocketAddrV4, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bascule_probe_wire::TCP_PORT;
use bascule_probe_wire::guest_report::Report;

use crate::{Network, wait_for};

/// An open TCP session with a probe guest.
#[derive(Debug)]
pub struct Session {
    stream: BufReader<TcpStream>,
    lines: u64,
}

impl Session {
    /// Connects to the guest as soon as it listens.
    ///
    /// # Errors
    /// When it does not within `limit`.
    pub fn open(network: &Network, guest: Ipv4Addr, limit: Duration) -> Result<Self> {
        let address = SocketAddrV4::new(guest, TCP_PORT);
        let stream = wait_for(&format!("a guest that listens on {address}"), limit, || {
            Ok(network.connect(address, CONNECT_TIME).ok())
        })?;
        Self::over(stream)
    }

    /// A session over a connection.
    ///
    /// # Errors
    /// When the connection takes no options.
    pub fn over(stream: TcpStream) -> Result<Self> {
        stream.set_nodelay(true).context("set no delay")?;
        stream
            .set_read_timeout(Some(ANSWER_TIME))
            .context("set a time limit")?;
        Ok(Self {
            stream: BufReader::new(stream),
            lines: 0,
        })
    }

    /// Sends a line and checks that the response has the session's next number.
    ///
    /// # Errors
    /// When the connection breaks, the response is late, or its number is wrong.
    pub fn count(&mut self) -> Result<()> {
        let text = format!("line{}", self.lines + 1);
        let answer = self.ask(&text)?;
        let expected = format!("n {} {text}", self.lines);
        ensure!(
            answer == expected,
            "the guest answered {answer:?} instead of {expected:?}"
        );
        Ok(())
    }

    /// The guest's report.
    ///
    /// # Errors
    /// As [`Self::count`].
    pub fn report(&mut self) -> Result<Report> {
        let answer = self.ask("stat")?;
        answer.parse().with_context(|| format!("read {answer:?}"))
    }

    /// The guest's report; an error if one of its fault counters is not zero.
    ///
    /// # Errors
    /// As [`Self::count`], or the report.
    pub fn clean_report(&mut self) -> Result<Report> {
        let report = self.report()?;
        ensure!(report.faults() == 0, "the guest found faults: {report}");
        Ok(report)
    }

    /// The guest's report as soon as it has looked through its disk and written to it: only then it knows what
    /// the disk held when it started.
    ///
    /// # Errors
    /// As [`Self::clean_report`], or when it does not within `limit`.
    pub fn written_report(&mut self, limit: Duration) -> Result<Report> {
        wait_for("the disk to be written", limit, || {
            let report = self.clean_report()?;
            Ok((report.disk_ack > 0).then_some(report))
        })
    }

    /// Sends a command whose response is `ok`: `poweroff`, `reset`, `fault`, `set KEY=VALUE`.
    ///
    /// # Errors
    /// As [`Self::count`], or another answer.
    pub fn command(&mut self, line: &str) -> Result<()> {
        let answer = self.ask(line)?;
        ensure!(answer == "ok", "the guest answered {answer:?} to {line:?}");
        Ok(())
    }

    fn ask(&mut self, line: &str) -> Result<String> {
        self.lines += 1;
        self.stream
            .get_mut()
            .write_all(format!("{line}\n").as_bytes())
            .context("send a line")?;
        let mut answer = String::new();
        let length = self
            .stream
            .read_line(&mut answer)
            .context("read the guest's answer")?;
        ensure!(length > 0, "the guest closed the session");
        Ok(answer.trim_end().to_owned())
    }
}

const CONNECT_TIME: Duration = Duration::from_millis(200);
/// Longer than any blackout that a test should survive.
const ANSWER_TIME: Duration = Duration::from_secs(20);
