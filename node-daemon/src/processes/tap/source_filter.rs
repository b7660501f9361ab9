//! The filter behind a tap: a guest sends only with the MAC address of its interface, as the source of a frame
//! and as the sender in ARP and RARP.
//!
//! It is a program of classic BPF at the tap's ingress (tc-bpf(8), "direct action"), where the kernel runs it
//! on each frame that the VM process writes, before the bridge sees the frame and learns its source. So it holds
//! against a guest that has taken over its process, which has no rights on the network. The kernel removes it
//! with the tap: no step of a failed start, and no crash, leaves a rule behind, as a table of nftables would stay.
//!
//! IP addresses are not filtered: a guest chooses its own, by DHCP, by hand or several of them, and nobody tells
//! Bascule which are its. So the addresses in IPv6 neighbor advertisements are not compared either: their
//! sender claims an IP address, as an ARP packet with the right MAC address may, and frames of whoever believes it
//! go to the MAC address that the guest names.

#![expect(
    clippy::host_endian_bytes,
    reason = "the kernel of this host reads them"
)]

use anyhow::{Context, Result};
use futures::StreamExt;
use rtnetlink::Handle;
use rtnetlink::packet_core::{
    DefaultNla, NLM_F_ACK, NLM_F_CREATE, NLM_F_REPLACE, NLM_F_REQUEST, NetlinkMessage,
    NetlinkPayload,
};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::tc::{
    TcAttribute, TcBpfFlags, TcFilterBpf, TcFilterBpfOption, TcHandle, TcMessage, TcOption,
};

/// Has the kernel drop frames of the tap with this interface index whose source is not `mac`. Replaces an
/// earlier filter.
pub(super) async fn install(handle: &Handle, tap: u32, mac: [u8; 6]) -> Result<()> {
    let index = i32::try_from(tap).context("an interface's index is positive")?;
    let added = handle.qdisc().add(index).ingress().execute().await;
    match added {
        Err(error) if !says_exists(&error) => return Err(error).context(MODULES),
        _ => {}
    }
    let mut request = NetlinkMessage::from(RouteNetlinkMessage::NewTrafficFilter(filter(
        index,
        &program(mac),
    )));
    request.header.flags = NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE | NLM_F_REPLACE;
    let mut answers = handle.clone().request(request).context(MODULES)?;
    while let Some(answer) = answers.next().await {
        if let NetlinkPayload::Error(message) = answer.payload
            && message.code.is_some()
        {
            return Err(message.to_io()).context(MODULES);
        }
    }
    Ok(())
}

/// The filter with this program, the only one of the tap.
fn filter(index: i32, program: &[Instruction]) -> TcMessage {
    let option = |kind: u16, bytes: Vec<u8>| {
        TcOption::Bpf(TcFilterBpfOption::Other(DefaultNla::new(kind, bytes)))
    };
    let length = u16::try_from(program.len()).unwrap_or(u16::MAX);
    let code: Vec<u8> = program.iter().flat_map(|one| one.to_bytes()).collect();
    let mut message = TcMessage::with_index(index);
    message.header.handle = TcHandle::from(1);
    message.header.parent = TcHandle::from(INGRESS_FILTERS);
    message.header.info = (PRIORITY << 16) | u32::from(EVERY_PROTOCOL.to_be());
    message.attributes = vec![
        TcAttribute::Kind(TcFilterBpf::KIND.to_owned()),
        TcAttribute::Options(vec![
            option(TCA_BPF_OPS_LEN, length.to_ne_bytes().to_vec()),
            option(TCA_BPF_OPS, code),
            TcOption::Bpf(TcFilterBpfOption::Flags(TcBpfFlags::DirectAction)),
        ]),
    ];
    message
}

/// `struct sock_filter` (linux/filter.h).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Instruction {
    code: u16,
    /// How many instructions are skipped when a comparison holds, and when it does not.
    skips: [u8; 2],
    operand: u32,
}

impl Instruction {
    fn to_bytes(self) -> [u8; 8] {
        let [a, b] = self.code.to_ne_bytes();
        let [then, otherwise] = self.skips;
        let [c, d, e, f] = self.operand.to_ne_bytes();
        [a, b, then, otherwise, c, d, e, f]
    }
}

/// Passes frames with `mac` as their source, and as the sender if they are ARP or RARP; drops all others. The
/// kernel has removed the outermost VLAN tag. A load beyond a frame's end would end the program and pass the frame, so
/// lengths come first; a tap takes no frame without an Ethernet header.
fn program(mac: [u8; 6]) -> Vec<Instruction> {
    let [a, b, c, d, e, f] = mac;
    let (high, low) = (
        u32::from_be_bytes([a, b, c, d]),
        u32::from_be_bytes([0, 0, e, f]),
    );
    let instruction = |code, skips, operand| Instruction {
        code,
        skips,
        operand,
    };
    vec![
        instruction(LOAD_WORD, [0, 0], SOURCE_AT),
        instruction(JUMP_EQUAL, [0, 12], high),
        instruction(LOAD_HALF, [0, 0], SOURCE_AT + 4),
        instruction(JUMP_EQUAL, [0, 10], low),
        instruction(LOAD_HALF, [0, 0], TYPE_AT),
        instruction(JUMP_EQUAL, [1, 0], ARP),
        instruction(JUMP_EQUAL, [0, 6], REVERSE_ARP),
        instruction(LOAD_LENGTH, [0, 0], 0),
        instruction(JUMP_AT_LEAST, [0, 5], SENDER_AT + 6),
        instruction(LOAD_WORD, [0, 0], SENDER_AT),
        instruction(JUMP_EQUAL, [0, 3], high),
        instruction(LOAD_HALF, [0, 0], SENDER_AT + 4),
        instruction(JUMP_EQUAL, [0, 1], low),
        instruction(RETURN, [0, 0], TC_ACT_OK),
        instruction(RETURN, [0, 0], TC_ACT_SHOT),
    ]
}

fn says_exists(error: &rtnetlink::Error) -> bool {
    let exists = rustix::io::Errno::EXIST.raw_os_error();
    matches!(error, rtnetlink::Error::NetlinkError(message)
        if message.to_io().raw_os_error() == Some(exists))
}

const MODULES: &str =
    "filter its guest's source addresses (are the modules sch_ingress and cls_bpf loaded?)";
/// TC_H_MAKE(TC_H_CLSACT, TC_H_MIN_INGRESS)
const INGRESS_FILTERS: u32 = 0xFFFF_FFF2;
const PRIORITY: u32 = 1;
/// ETH_P_ALL
const EVERY_PROTOCOL: u16 = 3;
const TCA_BPF_OPS_LEN: u16 = 4;
const TCA_BPF_OPS: u16 = 5;
/// BPF_LD | BPF_W | BPF_ABS
const LOAD_WORD: u16 = 0x20;
/// BPF_LD | BPF_H | BPF_ABS
const LOAD_HALF: u16 = 0x28;
/// BPF_LD | BPF_W | BPF_LEN
const LOAD_LENGTH: u16 = 0x80;
/// BPF_JMP | BPF_JEQ | BPF_K
const JUMP_EQUAL: u16 = 0x15;
/// BPF_JMP | BPF_JGE | BPF_K
const JUMP_AT_LEAST: u16 = 0x35;
/// BPF_RET | BPF_K
const RETURN: u16 = 0x06;
const TC_ACT_OK: u32 = 0;
const TC_ACT_SHOT: u32 = 2;
/// Offsets from the start of the Ethernet header.
const SOURCE_AT: u32 = 6;
const TYPE_AT: u32 = 12;
/// Of an ARP packet for Ethernet (RFC 826).
const SENDER_AT: u32 = 22;
const ARP: u32 = 0x0806;
const REVERSE_ARP: u32 = 0x8035;
