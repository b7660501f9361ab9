//! One iSCSI connection: login, then commands in order (RFC 7143; error recovery level 0, one connection per session).
//!
//! ```text
//!   Login ──transit to full feature──► commands ──Logout, end of stream, replaced──► closed
//! ```

use std::net::TcpStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, bail};

use super::pdu::{DATA_BYTES_MAX, Pdu, keys, request, response, text};
use super::scsi::{Action, decide};
use super::session::{Sessions, Tasks};
use super::{Disk, SanPath};
use crate::command::named_thread;

/// Serves an initiator until it leaves.
pub(super) fn serve(
    mut stream: TcpStream,
    path: SanPath,
    disk: &Arc<Disk>,
    sessions: &Sessions,
) -> Result<()> {
    stream.set_nodelay(true).context("send at once")?;
    let mut login = Login::default();
    while !login.done {
        let Some(pdu) = Pdu::read(&mut stream)? else {
            return Ok(());
        };
        // The old session of this port ends before the new one begins.
        if login.tasks.is_none() {
            let initiator = login.begin(&pdu);
            let mut isid = [0; 6];
            isid.copy_from_slice(&pdu.header[8..14]);
            login.tasks = Some(sessions.reinstate((initiator, isid, path), &stream)?);
        }
        login.answer(&pdu, path)?.write(&mut stream)?;
    }
    let sender = Sender {
        stream: stream.try_clone().context("duplicate a connection")?,
        stat_sn: login.stat_sn,
        exp_cmd_sn: login.exp_cmd_sn,
    };
    let mut connection = Connection {
        stream,
        task: Task {
            node: login.node,
            disk: Arc::clone(disk),
            sender: Arc::new(Mutex::new(sender)),
            tasks: login.tasks.context("a login without a session")?,
        },
        send_bytes_max: login.send_bytes_max,
    };
    while connection.serve_one()? {}
    Ok(())
}

#[derive(Default)]
struct Login {
    node: String,
    tasks: Option<Arc<Tasks>>,
    stat_sn: u32,
    exp_cmd_sn: u32,
    send_bytes_max: usize,
    done: bool,
}

impl Login {
    /// Returns the initiator's name, whose part after the colon is the node's.
    fn begin(&mut self, pdu: &Pdu) -> String {
        let named = keys(&pdu.data)
            .into_iter()
            .find(|(key, _)| key == "InitiatorName");
        let (_, name) = named.unwrap_or_default();
        self.node = name.rsplit(':').next().unwrap_or_default().to_owned();
        self.send_bytes_max = RECEIVE_BYTES_DEFAULT;
        name
    }

    fn answer(&mut self, pdu: &Pdu, path: SanPath) -> Result<Pdu> {
        if pdu.opcode() != request::LOGIN {
            bail!("opcode {:#x} before the login", pdu.opcode());
        }
        let operational = pdu.flags() >> 2 & 3 == 1;
        let mut offer = Vec::new();
        for (key, value) in keys(&pdu.data) {
            if key == "MaxRecvDataSegmentLength" {
                let bytes = value.parse().unwrap_or(RECEIVE_BYTES_DEFAULT);
                self.send_bytes_max = bytes.min(DATA_BYTES_MAX);
            }
            if key == "AuthMethod" {
                offer.push(("AuthMethod", "None".to_owned()));
                offer.push(("TargetPortalGroupTag", path.group().to_string()));
            }
        }
        if operational {
            offer.extend(OPERATIONAL.map(|(key, value)| (key, value.to_owned())));
        }
        let mut answer = Pdu::answer(pdu, response::LOGIN, pdu.flags()).with_data(text(&offer));
        answer.header[8..16].copy_from_slice(&pdu.header[8..16]);
        // A session handle that is not zero, once it is complete.
        answer.header[15] = 1;
        self.exp_cmd_sn = pdu.word(24);
        answer.set_word(24, self.stat_sn);
        answer.set_word(28, self.exp_cmd_sn);
        answer.set_word(32, self.exp_cmd_sn + WINDOW);
        self.stat_sn += 1;
        self.done = pdu.flags() & 0x83 == 0x83;
        Ok(answer)
    }
}

/// The sending half, with the counters of both directions.
#[derive(Debug)]
struct Sender {
    stream: TcpStream,
    stat_sn: u32,
    exp_cmd_sn: u32,
}

impl Sender {
    /// Sends an answer; one with a status takes a status number.
    fn send(&mut self, mut pdu: Pdu, with_status: bool) -> Result<()> {
        pdu.set_word(24, self.stat_sn);
        self.stat_sn = self.stat_sn.wrapping_add(u32::from(with_status));
        pdu.set_word(28, self.exp_cmd_sn);
        pdu.set_word(32, self.exp_cmd_sn.wrapping_add(WINDOW));
        pdu.write(&mut self.stream)
    }
}

/// What performing a command needs; a held write has a copy on a thread of its own.
#[derive(Debug, Clone)]
struct Task {
    node: String,
    disk: Arc<Disk>,
    sender: Arc<Mutex<Sender>>,
    tasks: Arc<Tasks>,
}

impl Task {
    fn send(&self, pdu: Pdu, with_status: bool) -> Result<()> {
        let mut sender = self.sender.lock().unwrap_or_else(PoisonError::into_inner);
        sender.send(pdu, with_status)
    }

    fn good(&self, command: &Pdu) -> Result<()> {
        self.send(Pdu::answer(command, response::COMMAND, FINAL), true)
    }

    /// Lands a write and answers it.
    fn land(&self, command: &Pdu, received: SystemTime, offset: u64, data: &[u8]) -> Result<()> {
        let landed = self.disk.land(&self.node, received, offset, data);
        self.tasks.end();
        landed?;
        self.good(command)
    }
}

struct Connection {
    stream: TcpStream,
    task: Task,
    send_bytes_max: usize,
}

impl Connection {
    /// False once the initiator has left.
    fn serve_one(&mut self) -> Result<bool> {
        let Some(pdu) = Pdu::read(&mut self.stream)? else {
            return Ok(false);
        };
        if !pdu.immediate() && pdu.opcode() != request::DATA_OUT {
            let mut sender = self.task.sender.lock();
            let sender = sender
                .as_mut()
                .map_err(|_| anyhow::anyhow!("a thread failed"))?;
            sender.exp_cmd_sn = pdu.word(24).wrapping_add(1);
        }
        match pdu.opcode() {
            request::COMMAND => self.command(&pdu)?,
            request::NOP_OUT if pdu.word(16) == NO_TAG => {}
            request::NOP_OUT => {
                let mut answer = Pdu::answer(&pdu, response::NOP_IN, FINAL);
                answer.set_word(20, NO_TAG);
                self.task.send(answer.with_data(pdu.data), true)?;
            }
            request::TASK_MANAGEMENT => self.manage(pdu)?,
            request::LOGOUT => {
                let answer = Pdu::answer(&pdu, response::LOGOUT, FINAL);
                self.task.send(answer, true)?;
                return Ok(false);
            }
            _ => {
                let mut answer = Pdu::new(response::REJECT, FINAL).with_data(pdu.header.to_vec());
                // Command not supported.
                answer.header[2] = 5;
                answer.set_word(16, NO_TAG);
                self.task.send(answer, true)?;
            }
        }
        Ok(true)
    }

    fn command(&self, pdu: &Pdu) -> Result<()> {
        let mut cdb = [0; 16];
        cdb.copy_from_slice(&pdu.header[32..48]);
        match decide(&cdb, pdu.header[9], self.task.disk.bytes) {
            Action::Write { offset, bytes } => self.write(pdu, offset, bytes),
            Action::Read { offset, bytes } => {
                let data = self.task.disk.read(offset, bytes)?;
                self.answer_with(pdu, data)
            }
            Action::Answer(data) => self.answer_with(pdu, data),
            Action::Refuse(sense) => {
                let length = u16::try_from(sense.len()).context("sense data")?;
                let data = [&length.to_be_bytes()[..], &sense].concat();
                let mut answer = Pdu::answer(pdu, response::COMMAND, FINAL).with_data(data);
                // CHECK CONDITION
                answer.header[3] = 2;
                self.task.send(answer, true)
            }
        }
    }

    /// Data, as much as was expected, and the status with the last of it.
    fn answer_with(&self, command: &Pdu, mut data: Vec<u8>) -> Result<()> {
        let expected = command.word(20) as usize;
        if data.is_empty() || expected == 0 {
            return self.task.good(command);
        }
        data.truncate(expected);
        let missing = u32::try_from(expected - data.len()).context("residual")?;
        let mut offset = 0;
        for (number, chunk) in (0..).zip(data.chunks(self.send_bytes_max)) {
            let last = offset + chunk.len() == data.len();
            // Final, status and, if less was there than expected, underflow.
            let flags = if last {
                FINAL | 1 | u8::from(missing > 0) << 1
            } else {
                0
            };
            let mut answer = Pdu::answer(command, response::DATA_IN, flags);
            answer.set_word(20, NO_TAG);
            answer.set_word(36, number);
            answer.set_word(40, u32::try_from(offset).context("offset")?);
            answer.set_word(44, if last { missing } else { 0 });
            offset += chunk.len();
            self.task.send(answer.with_data(chunk.to_vec()), last)?;
        }
        Ok(())
    }

    fn write(&self, command: &Pdu, offset: u64, bytes: usize) -> Result<()> {
        let data = command.data.clone();
        // The block limits keep every write within the immediate data.
        if data.len() != bytes {
            bail!("{} bytes for a write of {bytes}", data.len());
        }
        let received = SystemTime::now();
        if !self.task.tasks.begin() {
            bail!("the session was replaced");
        }
        if !self.task.disk.holds(&self.task.node, offset, bytes) {
            return self.task.land(command, received, offset, &data);
        }
        let (task, command) = (self.task.clone(), command.clone());
        task.disk
            .record(&task.node, received, "held", offset, bytes)?;
        named_thread("held write", move || {
            while task.disk.holds(&task.node, offset, bytes) {
                std::thread::sleep(HOLD_CHECK);
            }
            if let Err(error) = task.land(&command, received, offset, &data) {
                eprintln!("held write: {error:#}");
            }
        })
    }

    /// Task management: answered once no earlier command can take effect any more, as a target must.
    fn manage(&self, pdu: Pdu) -> Result<()> {
        let task = self.task.clone();
        named_thread("task management", move || {
            task.tasks.wait_idle();
            let answer = Pdu::answer(&pdu, response::TASK_MANAGEMENT, FINAL);
            if let Err(error) = task.send(answer, true) {
                eprintln!("task management: {error:#}");
            }
        })
    }
}

/// Answers to an initiator's operational keys (§13), and our own.
const OPERATIONAL: [(&str, &str); 13] = [
    ("HeaderDigest", "None"),
    ("DataDigest", "None"),
    ("MaxRecvDataSegmentLength", "262144"),
    ("InitialR2T", "Yes"),
    ("ImmediateData", "Yes"),
    ("MaxBurstLength", "262144"),
    ("FirstBurstLength", "262144"),
    ("MaxOutstandingR2T", "1"),
    ("MaxConnections", "1"),
    ("DataPDUInOrder", "Yes"),
    ("DataSequenceInOrder", "Yes"),
    ("DefaultTime2Wait", "0"),
    ("ErrorRecoveryLevel", "0"),
];
/// Of an initiator that does not say otherwise (§13.12).
const RECEIVE_BYTES_DEFAULT: usize = 8192;
const FINAL: u8 = 0x80;
const NO_TAG: u32 = u32::MAX;
/// Commands that an initiator may send before the oldest is answered.
const WINDOW: u32 = 64;
/// How soon a held write lands after its release.
const HOLD_CHECK: Duration = Duration::from_millis(20);
