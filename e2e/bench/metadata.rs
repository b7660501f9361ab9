//! The volume's metadata: changes per second of one client that waits for each answer, and of many clients at
//! once, beside a 4 KiB write and a flush after the other on the same file system. One client is what every client
//! would get if each change had a flush of its own.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use bascule_e2e::{TestCluster, TestNode};
use bascule_ipc::Connection;
use bascule_ipc::volume::{Request, Response};
use bascule_types::{Change, RowName, VmUid};

/// Measures with 1, 8 and 64 clients, and prints the rates.
pub(crate) fn run() -> Result<()> {
    let (cluster, node) = TestCluster::new(VOLUME_MIB)?;
    // Once it is answered, the node coordinates.
    node.change(create(u16::MAX)?.1)?;
    let flushes = flushes_per_second(&cluster.volume().with_extension("bench"))?;
    println!("\nmetadata changes of a volume in a file, per second");
    println!("{:<34}{:>12}{:>12}", "", "per second", "ratio");
    println!("{:<34}{flushes:>12.0}", "write 4 KiB and flush");
    let mut alone = None;
    for clients in [1, 8, 64] {
        let rate = changes_per_second(&node, clients)?;
        let alone = *alone.get_or_insert(rate);
        let name = format!("changes, clients at once: {clients}");
        println!("{name:<34}{rate:>12.0}{:>12.2}", rate / alone);
    }
    Ok(())
}

fn create(n: u16) -> Result<(VmUid, Change)> {
    let vm = VmUid::from_bytes((u128::from(n) + 1).to_be_bytes());
    let create = Change::CreateVm {
        vm,
        name: RowName::new(format!("bench/vm-{n}")).context("a name")?,
        spec_digest: [0; 32],
    };
    Ok((vm, create))
}

/// Each client creates and deletes a VM of its own, again and again.
fn changes_per_second(node: &TestNode, clients: u16) -> Result<f64> {
    let changes = AtomicU64::new(0);
    let start = Instant::now();
    thread::scope(|scope| {
        let client = |n: u16| {
            let changes = &changes;
            let mut connection = Connection::connect(&node.volume_socket(), TIMEOUT)?;
            Ok(scope.spawn(move || -> Result<()> {
                let (vm, create) = create(n)?;
                while start.elapsed() < TIME {
                    for change in [create.clone(), Change::DeleteVm { vm }] {
                        match connection.call(&Request::Change(change))?.0 {
                            Response::Granted(_) => changes.fetch_add(1, Ordering::Relaxed),
                            other => bail!("a change was answered by {other:?}"),
                        };
                    }
                }
                Ok(())
            }))
        };
        let threads: Vec<_> = (0..clients).map(client).collect::<Result<_>>()?;
        for thread in threads {
            thread.join().ok().context("a client panicked")??;
        }
        Ok::<(), anyhow::Error>(())
    })?;
    let changes = u32::try_from(changes.into_inner())?;
    Ok(f64::from(changes) / start.elapsed().as_secs_f64())
}

fn flushes_per_second(path: &Path) -> Result<f64> {
    let file = File::create(path).with_context(|| format!("create {}", path.display()))?;
    let block = [7; 4096];
    let start = Instant::now();
    let mut count = 0_u32;
    while start.elapsed() < TIME {
        file.write_all_at(&block, u64::from(count % 1024) * 4096)?;
        file.sync_data()?;
        count += 1;
    }
    Ok(f64::from(count) / start.elapsed().as_secs_f64())
}

const VOLUME_MIB: u32 = 1024;
const TIME: Duration = Duration::from_secs(3);
const TIMEOUT: Duration = Duration::from_secs(30);
