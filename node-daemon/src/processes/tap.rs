//! Tap devices: one for each interface of a VM, attached to a bridge of the node.
//!
//! A tap is persistent: it outlives the daemon, and the VM process opens it by name without network
//! privileges. It is removed together with the VM process's run directory.

use anyhow::{Context, Result, bail};
use bascule_devices::net::TapFd;
use bascule_types::{NodeUid, VmUid};
use futures::TryStreamExt;
use rtnetlink::packet_route::link::{InfoKind, LinkAttribute, LinkInfo, LinkMessage};
use rtnetlink::{Handle, LinkUnspec};
use sha2::{Digest, Sha256};

/// The name of a VM's tap: 15 bytes are allowed (IFNAMSIZ less the NUL), so it is `bs`, 8 hex digits
/// that stand for node and VM (two nodes of a lab may share a network namespace) and the
/// interface's index.
pub(crate) fn name(node: NodeUid, vm: VmUid, index: usize) -> String {
    let digest = Sha256::digest([node.to_bytes(), vm.to_bytes()].concat());
    let short: String = digest
        .iter()
        .take(4)
        .map(|byte| format!("{byte:02x}"))
        .collect();
    format!("bs{short}-{index}")
}

/// Creates the tap, attaches it to the bridge and brings it up. Idempotent.
pub(crate) fn ensure(tap: &str, bridge: &str) -> Result<()> {
    on_rtnetlink(async |handle| {
        let Some(bridge_link) = find(handle, bridge).await? else {
            bail!("no such interface")
        };
        if !is_bridge(&bridge_link) {
            bail!("it is not a bridge");
        }
        TapFd::create_persistent(tap)
            .with_context(|| format!("create tap {tap} (is the tun module loaded?)"))?;
        let Some(link) = find(handle, tap).await? else {
            bail!("tap {tap} vanished")
        };
        let change = LinkUnspec::new_with_index(link.header.index)
            .controller(bridge_link.header.index)
            .up()
            .build();
        handle
            .link()
            .set(change)
            .execute()
            .await
            .with_context(|| format!("attach {tap}"))
    })
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_taps_name_fits_an_interface_name() {
        let (one, other, vm) = (NodeUid::random(), NodeUid::random(), VmUid::random());
        assert!(name(one, vm, 15).len() <= 15);
        assert_ne!(name(one, vm, 0), name(other, vm, 0));
        assert_ne!(name(one, vm, 0), name(one, vm, 1));
    }

    /// Two commands removed the same VM process, and the later one failed with "No such device".
    #[test]
    fn only_enodev_means_that_another_command_has_removed_the_tap() {
        let answer = |code: i32| {
            let mut message = rtnetlink::packet_core::ErrorMessage::default();
            message.code = std::num::NonZeroI32::new(code);
            rtnetlink::Error::NetlinkError(message)
        };
        assert!(says_gone(&answer(-19)), "ENODEV");
        assert!(!says_gone(&answer(-1)), "EPERM");
        assert!(!says_gone(&rtnetlink::Error::RequestFailed));
    }

    #[test]
    fn a_bridge_that_does_not_exist_is_named_as_the_reason() {
        let error = ensure("bs00000000-0", "bsc-no-such-br").unwrap_err();
        assert!(
            format!("{error:#}").contains("no such interface"),
            "{error:#}"
        );
    }
}
