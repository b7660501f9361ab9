//! A flow of one packet per millisecond to the guest and back.

use std::net::{Ipv4Addr, SocketAddrV4, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use bascule_probe_wire::UDP_PORT;

use crate::Network;

/// A running flow; stopped when dropped.
#[derive(Debug)]
pub struct Flow {
    running: Arc<AtomicBool>,
    sent: Arc<AtomicU64>,
    sender: Option<JoinHandle<()>>,
    receiver: Option<JoinHandle<Vec<Arrival>>>,
}

/// Result of a flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FlowSummary {
    /// Packets sent.
    pub sent: u64,
    /// Packets that came back, without duplicates.
    pub received: u64,
    /// Packets that came back more than once.
    pub duplicated: u64,
    /// Packets that did not come back.
    pub lost: u64,
    /// Longest time between two consecutive arrivals: the outage that a client sees.
    pub gap_max: Duration,
}

#[derive(Clone, Copy, Debug)]
struct Arrival {
    at: Instant,
    number: u64,
}

impl Flow {
    /// Starts a flow to `guest`.
    ///
    /// # Errors
    /// When the socket or a thread cannot be created.
    pub fn start(network: &Network, guest: Ipv4Addr) -> Result<Self> {
        Self::over(network.udp(SocketAddrV4::new(guest, UDP_PORT))?, PERIOD)
    }

    /// Starts a flow of a packet each `period` over a connected socket whose peer sends back what it
    /// gets.
    ///
    /// # Errors
    /// When a thread cannot be started.
    pub fn over(socket: UdpSocket, period: Duration) -> Result<Self> {
        socket
            .set_read_timeout(Some(READ_TIME))
            .context("set a time limit")?;
        let receiving = socket.try_clone().context("share the socket")?;
        let running = Arc::new(AtomicBool::new(true));
        let sent = Arc::new(AtomicU64::new(0));
        let (send_running, receive_running) = (Arc::clone(&running), Arc::clone(&running));
        let send_count = Arc::clone(&sent);
        let sender = std::thread::Builder::new()
            .name("flow-send".into())
            .spawn(move || send(&socket, period, &send_running, &send_count))
            .context("start a thread")?;
        let receiver = std::thread::Builder::new()
            .name("flow-receive".into())
            .spawn(move || receive(&receiving, &receive_running))
            .context("start a thread")?;
        Ok(Self {
            running,
            sent,
            sender: Some(sender),
            receiver: Some(receiver),
        })
    }

    /// Stops the flow and returns its result.
    ///
    /// # Errors
    /// When a thread of it panicked.
    pub fn finish(mut self) -> Result<FlowSummary> {
        self.running.store(false, Ordering::Relaxed);
        let panicked = |_| anyhow!("a thread of the flow panicked");
        if let Some(sender) = self.sender.take() {
            sender.join().map_err(panicked)?;
        }
        let arrivals = match self.receiver.take() {
            Some(receiver) => receiver.join().map_err(panicked)?,
            None => Vec::new(),
        };
        Ok(summarize(self.sent.load(Ordering::Relaxed), &arrivals))
    }
}

impl Drop for Flow {
    fn drop(&mut self) {
        self.running.store(false, Ordering::Relaxed);
    }
}

fn send(socket: &UdpSocket, period: Duration, running: &AtomicBool, sent: &AtomicU64) {
    let mut next = Instant::now();
    while running.load(Ordering::Relaxed) {
        let number = sent.fetch_add(1, Ordering::Relaxed) + 1;
        // A packet that the kernel refuses (the guest's port was unreachable) counts as lost.
        drop(socket.send(&number.to_le_bytes()));
        next += period;
        std::thread::sleep(next.saturating_duration_since(Instant::now()));
    }
}

/// Receives until the flow has stopped and nothing came for a while.
fn receive(socket: &UdpSocket, running: &AtomicBool) -> Vec<Arrival> {
    let mut arrivals = Vec::new();
    let mut packet = [0; 64];
    loop {
        let received = socket.recv(&mut packet);
        let at = Instant::now();
        match received {
            Ok(length) if length >= 8 => {
                let mut number = [0; 8];
                number.copy_from_slice(&packet[..8]);
                arrivals.push(Arrival {
                    at,
                    number: u64::from_le_bytes(number),
                });
            }
            Ok(_) => {}
            Err(_) if running.load(Ordering::Relaxed) => {}
            Err(_) => return arrivals,
        }
    }
}

fn summarize(sent: u64, arrivals: &[Arrival]) -> FlowSummary {
    let mut numbers: Vec<u64> = arrivals.iter().map(|arrival| arrival.number).collect();
    let all = numbers.len();
    numbers.sort_unstable();
    numbers.dedup();
    let received = numbers.len() as u64;
    let gaps = arrivals
        .windows(2)
        .map(|pair| pair[1].at.duration_since(pair[0].at));
    FlowSummary {
        sent,
        received,
        duplicated: (all - numbers.len()) as u64,
        lost: sent.saturating_sub(received),
        gap_max: gaps.max().unwrap_or_default(),
    }
}

const PERIOD: Duration = Duration::from_millis(1);
/// How long to wait for late packets at the end.
const READ_TIME: Duration = Duration::from_millis(200);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn losses_duplicates_and_the_gap_are_counted() {
        let start = Instant::now();
        let arrival = |ms, number| Arrival {
            at: start + Duration::from_millis(ms),
            number,
        };
        let arrivals = [arrival(1, 1), arrival(2, 2), arrival(9, 2), arrival(10, 5)];
        let summary = summarize(5, &arrivals);
        assert_eq!(
            (summary.received, summary.duplicated, summary.lost),
            (3, 1, 2)
        );
        assert_eq!(summary.gap_max, Duration::from_millis(7));
    }
}
