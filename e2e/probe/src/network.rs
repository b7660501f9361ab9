//! The guest's network services: ARP and ping (by smoltcp), UDP echo, and the numbered TCP session.
//!
//! When it boots it announces its address, as an operating system does: until then the network's switches send what
//! is for it to where its MAC address was last seen, for minutes.
//!
//! TCP: each line is answered with `n <lines of this connection> <line>`, so a session that a
//! migration rolled back or repeated shows a wrong number. Lines that are commands are in
//! [`Command`]. UDP: each packet comes back with 16 bytes added: the guest's clock in microseconds
//! and the number of the packet, little-endian.

use core::fmt::Write;

use bascule_probe_wire::{TCP_PORT, UDP_PORT};
use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet, SocketStorage};
use smoltcp::phy::{Device, TxToken};
use smoltcp::socket::{tcp, udp};
use smoltcp::time::Instant;
use smoltcp::wire::{
    ArpOperation, ArpPacket, ArpRepr, EthernetAddress, EthernetFrame, EthernetProtocol,
    EthernetRepr, IpAddress, IpCidr, Ipv4Address,
};

use crate::arena;
use crate::nic::Nic;
use crate::panic_device::PanicEvent;
use crate::serial::Text;
use bascule_probe_wire::guest_report::Report;
use bascule_probe_wire::options::Options;

/// A command line over TCP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Command {
    PowerOff,
    Reset,
    /// A fault that no handler takes: the machine's triple fault.
    Fault,
    /// The kernel panics: what its pvpanic device is told, and whether the guest goes on nevertheless.
    Panic(PanicEvent, bool),
    /// An option changed: the memory worker must look at them again.
    Changed,
}

/// The network of the guest.
pub(crate) struct Network {
    nic: Nic,
    interface: Interface,
    address: [u8; 4],
    /// Announcements of the address that are still to be made.
    announcements_left: u32,
    next_announcement_us: u64,
    /// The second address that the interface has.
    alias: Option<[u8; 4]>,
    sockets: SocketSet<'static>,
    udp: SocketHandle,
    sessions: [Session; SESSIONS],
}

struct Session {
    handle: SocketHandle,
    line: [u8; LINE_BYTES_MAX],
    length: usize,
    lines: u64,
}

impl Network {
    /// Brings the interface up.
    pub(crate) fn new(mut nic: Nic, options: &Options, seed: u64) -> Option<Self> {
        let (address, prefix) = options.ip?;
        let mut config = Config::new(EthernetAddress(nic.mac()).into());
        config.random_seed = seed;
        let mut interface = Interface::new(config, &mut nic, Instant::from_micros(0));
        let own = IpCidr::new(IpAddress::Ipv4(Ipv4Address::from(address)), prefix);
        let mut added = true;
        interface.update_ip_addrs(|addresses| added = addresses.push(own).is_ok());
        if let Some(gateway) = options.gateway {
            let route = interface
                .routes_mut()
                .add_default_ipv4_route(Ipv4Address::from(gateway));
            added &= route.is_ok();
        }
        let mut sockets = SocketSet::new(socket_storage());
        let udp = sockets.add(udp_socket()?);
        let sessions = core::array::from_fn(|_| Session::new(&mut sockets));
        added.then_some(Self {
            nic,
            interface,
            address,
            announcements_left: ANNOUNCEMENTS,
            next_announcement_us: 0,
            alias: None,
            sockets,
            udp,
            sessions,
        })
    }

    /// Polls the interface and returns a client's command, if there is one.
    pub(crate) fn poll(
        &mut self,
        now_us: u64,
        report: &mut Report,
        options: &mut Options,
    ) -> Option<Command> {
        let now = Instant::from_micros(now_us.cast_signed());
        self.announce(now_us);
        self.set_alias(options.alias);
        self.interface.poll(now, &mut self.nic, &mut self.sockets);
        echo(
            self.sockets.get_mut::<udp::Socket<'_>>(self.udp),
            now_us,
            report,
        );
        let mut command = None;
        for session in &mut self.sessions {
            let requested = session.serve(&mut self.sockets, report, options);
            command = command.or(requested);
        }
        // Sends what the sessions wrote now, not with the next received packet.
        self.interface.poll(now, &mut self.nic, &mut self.sockets);
        command
    }

    /// Announces the address as after its configuration (RFC 5227, 2.3).
    fn announce(&mut self, now_us: u64) {
        if self.announcements_left == 0 || now_us < self.next_announcement_us {
            return;
        }
        let mac = EthernetAddress(self.nic.mac());
        let now = Instant::from_micros(now_us.cast_signed());
        let Some(slot) = self.nic.transmit(now) else {
            return;
        };
        let ethernet = EthernetRepr {
            src_addr: mac,
            dst_addr: EthernetAddress::BROADCAST,
            ethertype: EthernetProtocol::Arp,
        };
        let arp = ArpRepr::EthernetIpv4 {
            operation: ArpOperation::Request,
            source_hardware_addr: mac,
            source_protocol_addr: Ipv4Address::from(self.address),
            target_hardware_addr: EthernetAddress([0; 6]),
            target_protocol_addr: Ipv4Address::from(self.address),
        };
        slot.consume(ethernet.buffer_len() + arp.buffer_len(), |bytes| {
            let mut frame = EthernetFrame::new_unchecked(bytes);
            ethernet.emit(&mut frame);
            arp.emit(&mut ArpPacket::new_unchecked(frame.payload_mut()));
        });
        self.announcements_left -= 1;
        self.next_announcement_us = now_us + ANNOUNCEMENT_INTERVAL_US;
    }

    /// Gives the interface this second address, or takes it back.
    fn set_alias(&mut self, alias: Option<[u8; 4]>) {
        if self.alias == alias {
            return;
        }
        self.alias = alias;
        self.interface.update_ip_addrs(|addresses| {
            addresses.truncate(1);
            let added = alias.map(|address| {
                let address = IpAddress::Ipv4(Ipv4Address::from(address));
                addresses.push(IpCidr::new(address, 32)).is_ok()
            });
            assert!(
                added != Some(false),
                "an interface has room for two addresses"
            );
        });
    }
}

impl Session {
    fn new(sockets: &mut SocketSet<'static>) -> Self {
        let receive = tcp::SocketBuffer::new(arena::bytes(TCP_BUFFER_BYTES));
        let send = tcp::SocketBuffer::new(arena::bytes(TCP_BUFFER_BYTES));
        let mut socket = tcp::Socket::new(receive, send);
        socket.set_nagle_enabled(false);
        socket.set_ack_delay(None);
        let handle = sockets.add(socket);
        Self {
            handle,
            line: [0; LINE_BYTES_MAX],
            length: 0,
            lines: 0,
        }
    }

    fn serve(
        &mut self,
        sockets: &mut SocketSet<'static>,
        report: &mut Report,
        options: &mut Options,
    ) -> Option<Command> {
        let socket = sockets.get_mut::<tcp::Socket<'_>>(self.handle);
        if !socket.is_open() {
            self.length = 0;
            self.lines = 0;
            assert!(
                socket.listen(TCP_PORT).is_ok(),
                "a closed socket may listen"
            );
            return None;
        }
        if !socket.may_recv() && socket.may_send() && socket.recv_queue() == 0 {
            socket.close();
        }
        let mut command = None;
        // A whole answer must fit, so that a slow reader stops the reading and loses nothing.
        while socket.can_recv() && socket.send_capacity() - socket.send_queue() >= ANSWER_BYTES_MAX
        {
            let mut byte = [0];
            if socket.recv_slice(&mut byte) != Ok(1) {
                break;
            }
            if byte[0] != b'\n' {
                let fits = self.length < LINE_BYTES_MAX;
                if fits {
                    self.line[self.length] = byte[0];
                    self.length += 1;
                }
                continue;
            }
            self.lines += 1;
            report.tcp += 1;
            let line = core::str::from_utf8(&self.line[..self.length]).unwrap_or("?");
            let mut answer = Text::<ANSWER_BYTES_MAX>::new();
            command = command.or(self.answer(line, &mut answer, report, options));
            self.length = 0;
            assert!(
                socket.send_slice(answer.as_bytes()).is_ok(),
                "there was room for the answer"
            );
        }
        command
    }

    fn answer(
        &self,
        line: &str,
        answer: &mut Text<ANSWER_BYTES_MAX>,
        report: &Report,
        options: &mut Options,
    ) -> Option<Command> {
        let count = self.lines;
        let (written, command) = match line {
            "stat" => (writeln!(answer, "{report}"), None),
            "poweroff" => (writeln!(answer, "ok"), Some(Command::PowerOff)),
            "reset" => (writeln!(answer, "ok"), Some(Command::Reset)),
            "fault" => (writeln!(answer, "ok"), Some(Command::Fault)),
            "panic" => (
                writeln!(answer, "ok"),
                Some(Command::Panic(PanicEvent::Panicked, false)),
            ),
            "panic and go on" => (
                writeln!(answer, "ok"),
                Some(Command::Panic(PanicEvent::Panicked, true)),
            ),
            "kdump" => (
                writeln!(answer, "ok"),
                Some(Command::Panic(PanicEvent::CrashLoaded, true)),
            ),
            _ => match line
                .strip_prefix("set ")
                .and_then(|rest| rest.split_once('='))
            {
                Some((key, value)) if options.set(key, value).is_some() => {
                    (writeln!(answer, "ok"), Some(Command::Changed))
                }
                Some(_) => (writeln!(answer, "error not understood"), None),
                None => (writeln!(answer, "n {count} {line}"), None),
            },
        };
        assert!(written.is_ok(), "a line and its number fit into an answer");
        command
    }
}

fn echo(socket: &mut udp::Socket<'_>, now_us: u64, report: &mut Report) {
    while socket.can_recv() && socket.can_send() {
        let mut packet = [0; UDP_BYTES_MAX + 16];
        let Ok((length, from)) = socket.recv_slice(&mut packet[..UDP_BYTES_MAX]) else {
            continue;
        };
        report.udp += 1;
        packet[length..length + 8].copy_from_slice(&now_us.to_le_bytes());
        packet[length + 8..length + 16].copy_from_slice(&report.udp.to_le_bytes());
        if socket.send_slice(&packet[..length + 16], from).is_err() {
            break;
        }
    }
}

fn udp_socket() -> Option<udp::Socket<'static>> {
    static METADATA: crate::once::Once<[[udp::PacketMetadata; UDP_PACKETS]; 2]> =
        crate::once::Once::new([[udp::PacketMetadata::EMPTY; UDP_PACKETS]; 2]);
    let [receive, send] = METADATA.take()?;
    let receive = udp::PacketBuffer::new(&mut receive[..], arena::bytes(UDP_BUFFER_BYTES));
    let send = udp::PacketBuffer::new(&mut send[..], arena::bytes(UDP_BUFFER_BYTES));
    let mut socket = udp::Socket::new(receive, send);
    socket.bind(UDP_PORT).ok()?;
    Some(socket)
}

fn socket_storage() -> &'static mut [SocketStorage<'static>] {
    static STORAGE: crate::once::Once<[SocketStorage<'static>; SESSIONS + 1]> =
        crate::once::Once::new([const { SocketStorage::EMPTY }; SESSIONS + 1]);
    STORAGE.take().map_or(&mut [], |storage| &mut storage[..])
}

/// RFC 5227, 1.1: ANNOUNCE_NUM and ANNOUNCE_INTERVAL.
const ANNOUNCEMENTS: u32 = 2;
const ANNOUNCEMENT_INTERVAL_US: u64 = 2_000_000;
const SESSIONS: usize = 8;
const LINE_BYTES_MAX: usize = 256;
const ANSWER_BYTES_MAX: usize = 1024;
const TCP_BUFFER_BYTES: usize = 16384;
const UDP_BUFFER_BYTES: usize = 131_072;
/// One second of a 1 kHz flow: a guest that was stopped for that long still echoes every packet.
const UDP_PACKETS: usize = 1024;
const UDP_BYTES_MAX: usize = 1456;
