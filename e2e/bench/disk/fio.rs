//! The baseline: fio, with the file opened for direct I/O and submissions in batches.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::{Figures, Work};

pub(crate) fn measure(path: &Path, work: Work, time: Duration) -> Result<Figures> {
    let (kind, mode) = if work.is_write {
        ("write", "randwrite")
    } else {
        ("read", "randread")
    };
    let output = Command::new("fio")
        .args([
            "--name=raw",
            "--ioengine=io_uring",
            "--direct=1",
            "--thread",
        ])
        .args([
            "--time_based",
            "--output-format=json",
            "--lat_percentiles=1",
        ])
        .args(["--norandommap", "--random_generator=tausworthe64"])
        .arg(format!("--filename={}", path.display()))
        .arg(format!("--rw={mode}"))
        .arg(format!("--bs={}", work.bytes))
        .arg(format!("--iodepth={}", work.depth))
        .arg(format!("--runtime={}", time.as_secs()))
        .output()
        .context("run fio (Debian package fio)")?;
    ensure!(
        output.status.success(),
        "fio: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    let report: Value = serde_json::from_slice(&output.stdout).context("fio's report")?;
    let job = &report["jobs"][0];
    let figures = &job[kind];
    let nanos = figures["lat_ns"]["percentile"]["50.000000"].as_u64();
    let percent = job["usr_cpu"].as_f64().zip(job["sys_cpu"].as_f64());
    let percent = percent.map(|(user, system)| user + system);
    let millis = job["job_runtime"]
        .as_f64()
        .context("no run time in fio's report")?;
    let cpu = percent.context("no CPU time in fio's report")? / 100.0 * millis / 1000.0;
    let count = figures["total_ios"]
        .as_f64()
        .context("no count in fio's report")?;
    Ok(Figures {
        cpu: Duration::try_from_secs_f64(cpu / count)?,
        per_second: figures["iops"]
            .as_f64()
            .context("no iops in fio's report")?,
        median: Duration::from_nanos(nanos.context("no median in fio's report")?),
    })
}
