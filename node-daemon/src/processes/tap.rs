//! Tap devices: one for each interface of a VM, attached to a bridge of the node.
//!
//! A tap is persistent: it outlives the daemon, and the VM process opens it by name without network
//! privileges. It is removed together with the VM process's run directory.
//!
//! A bridge must not notice a tap. Unless an administrator has set them, the kernel gives a bridge the
//! smallest MTU of its ports and the lowest of their addresses (net/bridge: `br_mtu_auto_adjust`,
//! `br_stp_recalculate_bridge_id`). So a tap gets the bridge's MTU before it joins, of which the guest
//! is told (VIRTIO_NET_F_MTU), and an address that is higher than those of network cards.

use anyhow::{Context, Result, bail};
use bascule_devices::net::TapFd;
use bascule_types::{NodeUid, VmUid};
use futures::TryStreamExt;
use rtnetlink::packet_route::link::{InfoKind, LinkAttribute, LinkInfo, LinkMessage};
use rtnetlink::{Handle, LinkUnspec};
use sha2::{Digest, Sha256};

mod source_filter;

/// The name of a VM's tap: 15 bytes are allowed (IFNAMSIZ less the NUL), so it is `bs`, 8 hex digits
/// that stand for node and VM (two nodes of a lab may share a network namespace) and the
/// interface's index.
pub(crate) fn name(node: NodeUid, vm: VmUid, index: usize) -> String {
    format!("{}{index}", prefix(node, vm))
}

/// What the names of all taps of a VM begin with.
fn prefix(node: NodeUid, vm: VmUid) -> String {
    let digest = Sha256::digest([node.to_bytes(), vm.to_bytes()].concat());
    let short: String = digest
        .iter()
        .take(4)
        .map(|byte| format!("{byte:02x}"))
        .collect();
    format!("bs{short}-")
}

/// Creates the tap of a guest's interface with the address `mac`, attaches it to the bridge and brings it up;
/// returns the bridge's MTU in bytes, which is the tap's too. From its first frame on, the guest sends with that
/// address only. Idempotent.
pub(crate) fn ensure(tap: &str, bridge: &str, mac: [u8; 6]) -> Result<u16> {
    on_rtnetlink(async |handle| {
        let Some(bridge_link) = find(handle, bridge).await? else {
            bail!("it does not exist on this node")
        };
        if !is_bridge(&bridge_link) {
            bail!("it is not a bridge");
        }
        let mtu = tap_mtu(mtu_of(&bridge_link).context("its MTU is not known")?)?;
        TapFd::create_persistent(tap)
            .with_context(|| format!("create tap {tap} (is the tun module loaded?)"))?;
        let Some(link) = find(handle, tap).await? else {
            bail!("tap {tap} vanished")
        };
        let index = link.header.index;
        let own = LinkUnspec::new_with_index(index)
            .mtu(u32::from(mtu))
            .address(address(tap).to_vec());
        let set = handle.link().set(own.build()).execute().await;
        set.with_context(|| format!("set MTU {mtu} and the address of {tap}"))?;
        source_filter::install(handle, index, mac).await?;
        let joined = LinkUnspec::new_with_index(index)
            .controller(bridge_link.header.index)
            .up();
        let set = handle.link().set(joined.build()).execute().await;
        set.with_context(|| format!("attach {tap}"))?;
        Ok(mtu)
    })
}

/// The MTU in bytes that a tap takes on a bridge with this one.
fn tap_mtu(of_bridge: u32) -> Result<u16> {
    match u16::try_from(of_bridge) {
        Ok(mtu) if (MTU_MIN..=MTU_MAX).contains(&mtu) => Ok(mtu),
        _ => bail!("its MTU is {of_bridge} bytes; a tap can have {MTU_MIN} to {MTU_MAX}"),
    }
}

/// The address of a tap: locally administered, and higher than those of network cards. The guest's
/// interface has another one.
fn address(tap: &str) -> [u8; 6] {
    let digest = Sha256::digest(tap);
    let [a, b, c, d, ..] = <[u8; 32]>::from(digest);
    [0xFE, 0xFF, a, b, c, d]
}

/// Removes all taps of a VM, whatever its present configuration says.
pub(crate) fn remove_all(node: NodeUid, vm: VmUid) -> Result<()> {
    let prefix = prefix(node, vm);
    let links = on_rtnetlink(async |handle| {
        let links: Vec<LinkMessage> = handle
            .link()
            .get()
            .execute()
            .try_collect()
            .await
            .context("list the interfaces")?;
        Ok(links)
    })?;
    for name in links.iter().filter_map(name_of) {
        if name.starts_with(&prefix) {
            remove(name)?;
        }
    }
    Ok(())
}

/// Removes the tap, if it is there.
pub(crate) fn remove(tap: &str) -> Result<()> {
    on_rtnetlink(async |handle| match find(handle, tap).await? {
        Some(link) => {
            let index = link.header.index;
            match handle.link().del(index).execute().await {
                Err(error) if says_gone(&error) => Ok(()),
                done => done.with_context(|| format!("remove {tap}")),
            }
        }
        None => Ok(()),
    })
}

fn on_rtnetlink<T>(work: impl AsyncFnOnce(&Handle) -> Result<T>) -> Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .build()
        .context("start a runtime for rtnetlink")?;
    runtime.block_on(async {
        let (connection, handle, _) = rtnetlink::new_connection().context("open rtnetlink")?;
        let task = tokio::spawn(connection);
        let outcome = work(&handle).await;
        task.abort();
        outcome
    })
}

async fn find(handle: &Handle, name: &str) -> Result<Option<LinkMessage>> {
    match handle
        .link()
        .get()
        .match_name(name.to_owned())
        .execute()
        .try_next()
        .await
    {
        Ok(link) => Ok(link),
        Err(error) if says_gone(&error) => Ok(None),
        Err(error) => Err(error).with_context(|| format!("look up interface {name}")),
    }
}

/// Whether the kernel's answer is that there is no such interface (any more).
fn says_gone(error: &rtnetlink::Error) -> bool {
    let gone = rustix::io::Errno::NODEV.raw_os_error();
    matches!(error, rtnetlink::Error::NetlinkError(message)
        if message.to_io().raw_os_error() == Some(gone))
}

fn is_bridge(link: &LinkMessage) -> bool {
    link.attributes.iter().any(|attribute| match attribute {
        LinkAttribute::LinkInfo(infos) => infos
            .iter()
            .any(|info| matches!(info, LinkInfo::Kind(InfoKind::Bridge))),
        _ => false,
    })
}

fn mtu_of(link: &LinkMessage) -> Option<u32> {
    link.attributes
        .iter()
        .find_map(|attribute| match attribute {
            LinkAttribute::Mtu(mtu) => Some(*mtu),
            _ => None,
        })
}

fn name_of(link: &LinkMessage) -> Option<&str> {
    link.attributes
        .iter()
        .find_map(|attribute| match attribute {
            LinkAttribute::IfName(name) => Some(name.as_str()),
            _ => None,
        })
}

/// ETH_MIN_MTU, which is also the least that VIRTIO_NET_F_MTU can announce (virtio 1.2, 5.1.4.1).
const MTU_MIN: u16 = 68;
/// What the tun driver allows: 65535 less the Ethernet header.
const MTU_MAX: u16 = 65_521;

#[cfg(test)]
pub(super) mod tests;
