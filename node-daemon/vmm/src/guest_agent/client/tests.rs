use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};

use super::*;
use crate::clock::ManualClock;

/// The port between client and agent: what the device does, as far as the client sees it.
struct Port {
    device: Arc<dyn HostPort>,
    agent: AgentHandle,
    pressed: Receiver<()>,
}

const MAC: [u8; 6] = [0x52, 0x54, 0, 0, 0, 1];
const SOON: Duration = Duration::from_secs(60);

/// A client that asks all the time and gives up early, so that nothing here waits for it.
fn port(set_time: bool, answer: Duration) -> Port {
    let (pressed_tx, pressed) = channel();
    let duties = Duties {
        macs: vec![MAC],
        set_time,
        press_button: Box::new(move || pressed_tx.send(()).unwrap()),
        clock: ManualClock::at(
            Duration::ZERO,
            Duration::from_nanos(1_764_370_000_123_456_789),
        ),
    };
    let pace = Pace {
        answer,
        poll: Duration::from_millis(1),
        shutdown: Duration::from_millis(50),
    };
    let (device, agent) = start_with(duties, pace).unwrap();
    Port {
        device,
        agent,
        pressed,
    }
}

impl Port {
    fn await_status(&self, what: &str, is_it: impl Fn(&GuestAgent) -> bool) -> GuestAgent {
        let deadline = Instant::now() + SOON;
        loop {
            let status = self.agent.status();
            if is_it(&status) {
                return status;
            }
            assert!(Instant::now() < deadline, "waiting for {what}: {status:?}");
            std::thread::park_timeout(Duration::from_millis(1));
        }
    }

    /// Opens the port and has `answer` answer each line of the client, until it returns none.
    fn serve(&self, mut answer: impl FnMut(&str) -> Option<Vec<u8>> + Send + 'static) {
        let (guest, forward) = UnixStream::pair().unwrap();
        let device = Arc::clone(&self.device);
        let mut input = BufReader::new(guest.try_clone().unwrap());
        let mut output = guest;
        // The device's two directions.
        let mut to_guest = forward.try_clone().unwrap();
        let reader = Arc::clone(&device);
        spawn(move || {
            let mut data = [0; 4096];
            loop {
                match reader.receive(&mut data) {
                    Ok(0) => return,
                    Ok(count) => {
                        if to_guest.write_all(&data[..count]).is_err() {
                            return;
                        }
                    }
                    Err(_) => std::thread::park_timeout(Duration::from_micros(100)),
                }
            }
        });
        spawn(move || {
            let mut data = [0; 4096];
            let mut from_guest = forward;
            while let Ok(count @ 1..) = from_guest.read(&mut data) {
                let mut rest = &data[..count];
                while !rest.is_empty() {
                    match device.send(rest) {
                        Ok(sent) => rest = &rest[sent..],
                        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                            std::thread::park_timeout(Duration::from_micros(100));
                        }
                        Err(_) => return,
                    }
                }
            }
        });
        spawn(move || {
            let mut line = Vec::new();
            while let Ok(1..) = input.read_until(b'\n', &mut line) {
                let text = String::from_utf8_lossy(&line).into_owned();
                let Some(said) = answer(&text) else { return };
                if output.write_all(&said).is_err() {
                    return;
                }
                line.clear();
            }
        });
        self.device.guest_opened(true);
    }
}

fn spawn(work: impl FnOnce() + Send + 'static) {
    std::thread::Builder::new().spawn(work).unwrap();
}

/// What `qemu-ga` answers.
fn agent(line: &str) -> Vec<u8> {
    let value = if let Some((_, id)) = line.split_once("\"id\":") {
        assert!(line.starts_with('\u{FFFD}'), "no 0xFF: {line}");
        let id = id.split('}').next().unwrap();
        return [b"\xFF", format!("{{\"return\": {id}}}\n").as_bytes()].concat();
    } else if line.contains("guest-info") {
        r#"{"version": "10.0.2"}"#
    } else if line.contains("guest-get-osinfo") {
        r#"{"id": "debian", "version-id": "13", "pretty-name": "Debian GNU/Linux 13 (trixie)"}"#
    } else if line.contains("guest-get-host-name") {
        r#"{"host-name": "web\u001b[2J"}"#
    } else if line.contains("guest-network-get-interfaces") {
        r#"[{"hardware-address": "52:54:00:00:00:01", "ip-addresses": [{"ip-address": "10.0.0.5"}]}]"#
    } else if line.contains("guest-set-time") {
        "{}"
    } else {
        return b"{\"error\": {\"class\": \"CommandNotFound\", \"desc\": \"\"}}\n".to_vec();
    };
    format!("{{\"return\": {value}}}\n").into_bytes()
}

fn is_connected(status: &GuestAgent) -> bool {
    matches!(status, GuestAgent::Connected(_))
}

#[test]
fn an_agent_that_answers_is_shown_until_it_closes_the_port() {
    let port = port(false, SOON);
    assert_eq!(port.agent.status(), GuestAgent::Absent);
    port.serve(|line| Some(agent(line)));
    let GuestAgent::Connected(info) = port.await_status("an answer", is_connected) else {
        panic!("it is not connected")
    };
    assert_eq!(info.agent_version, "10.0.2");
    assert_eq!(
        (info.host_name.as_str(), info.os.id.as_str()),
        ("web[2J", "debian")
    );
    assert_eq!(
        info.interfaces[0].addresses,
        ["10.0.0.5".parse::<std::net::IpAddr>().unwrap()]
    );
    port.device.guest_opened(false);
    assert_eq!(port.agent.status(), GuestAgent::Absent);
}

/// Before a synchronization, an agent may have in hand what the client of another node had asked.
#[test]
fn answers_to_earlier_requests_are_not_taken_for_later_ones() {
    let port = port(false, SOON);
    let mut first = true;
    port.serve(move |line| {
        // To the rest of a request that was cut off, to one before it, and to a synchronization.
        let stale = b"{\"error\": {\"class\": \"GenericError\", \"desc\": \"JSON parse error\"}}\n\
            {\"return\": {\"version\": \"stale\"}}\n\xFF{\"return\": 7}\n"
            .to_vec();
        let before = if std::mem::take(&mut first) {
            stale
        } else {
            Vec::new()
        };
        Some([before, agent(line)].concat())
    });
    let GuestAgent::Connected(info) = port.await_status("an answer", is_connected) else {
        panic!("it is not connected")
    };
    assert_eq!(info.agent_version, "10.0.2");
}

#[test]
fn an_agent_that_stops_answering_is_no_longer_shown_and_comes_back() {
    let port = port(false, Duration::from_millis(50));
    let (answers_tx, answers) = channel::<bool>();
    let mut answering = true;
    port.serve(move |line| {
        answering = answers.try_iter().last().unwrap_or(answering);
        Some(if answering { agent(line) } else { Vec::new() })
    });
    port.await_status("an answer", is_connected);
    answers_tx.send(false).unwrap();
    port.await_status("silence", |status| *status == GuestAgent::Silent);
    answers_tx.send(true).unwrap();
    port.await_status("an answer", is_connected);
}

/// It would have had the client read without end, or keep a line of any length.
#[test]
fn an_agent_that_only_writes_is_silent_and_is_not_read_between_exchanges() {
    let port = port(false, SOON);
    port.serve(|_| Some(vec![b'x'; 4 << 20]));
    port.await_status("silence", |status| *status == GuestAgent::Silent);
}

#[test]
fn a_restored_guest_is_told_the_time_once() {
    let port = port(true, SOON);
    let (lines_tx, lines) = channel();
    port.serve(move |line| {
        lines_tx.send(line.to_owned()).ok();
        Some(agent(line))
    });
    port.await_status("an answer", is_connected);
    port.device.guest_opened(false);
    let told: Vec<String> = lines
        .try_iter()
        .filter(|line| line.contains("set-time"))
        .collect();
    let wanted = r#"{"execute":"guest-set-time","arguments":{"time":1764370000123456789}}"#;
    assert_eq!(told, [format!("{wanted}\n")]);
}

#[test]
fn the_power_button_is_pressed_when_the_agent_refuses_or_does_nothing() {
    for refuses in [true, false] {
        let port = port(false, SOON);
        assert!(!port.agent.shut_down(), "there is no agent yet");
        let (lines_tx, lines) = channel();
        port.serve(move |line| {
            if line.contains("guest-shutdown") {
                lines_tx.send(line.to_owned()).ok();
                return Some(if refuses { agent(line) } else { Vec::new() });
            }
            Some(agent(line))
        });
        port.await_status("an answer", is_connected);
        assert!(port.agent.shut_down());
        assert!(!port.agent.shut_down(), "the second time it is the button");
        assert_eq!(lines.recv_timeout(SOON).unwrap(), format!("{SHUTDOWN}\n"));
        port.pressed.recv_timeout(SOON).unwrap();
    }
}

/// A console that is still attached keeps the device of a guest that is off: the status showed its agent until the process ended.
#[test]
fn an_agent_of_a_guest_that_is_off_is_not_shown_whatever_its_device_says() {
    let port = port(false, SOON);
    port.serve(|line| Some(agent(line)));
    port.await_status("an answer", is_connected);
    port.agent.end();
    port.device.guest_opened(true);
    assert_eq!(port.agent.status(), GuestAgent::Absent);
    let ended = Err(RecvTimeoutError::Disconnected);
    assert_eq!(port.pressed.recv_timeout(SOON), ended);
}

#[test]
fn the_client_ends_with_the_machine() {
    let port = port(false, SOON);
    let Port {
        device,
        pressed,
        agent,
    } = port;
    drop((device, agent));
    // Its end drops the function that presses the button.
    assert_eq!(
        pressed.recv_timeout(SOON),
        Err(RecvTimeoutError::Disconnected)
    );
}
