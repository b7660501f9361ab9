//! qcow2 images of every kind that `qemu-img` makes.

use crate::tools::{Workshop, assert_same, disk, read_disk};

const MIB: usize = 1 << 20;

#[test]
fn every_kind_of_qcow2_image_is_read_as_qemu_reads_it() {
    let test = "every_kind_of_qcow2_image_is_read_as_qemu_reads_it";
    let Some(workshop) = Workshop::or_skip(test, &["qemu-img"]) else {
        return;
    };
    let disk = disk(3 * MIB + 512);
    workshop.write("disk", &disk);
    let mut kinds = Vec::new();
    for compat in ["0.10", "1.1"] {
        for cluster in ["512", "4k", "64k", "2M"] {
            for compress in ["", " -c"] {
                kinds.push(format!(
                    "{compress} -o compat={compat},cluster_size={cluster}"
                ));
            }
        }
    }
    for options in [
        "refcount_bits=1",
        "refcount_bits=64",
        "lazy_refcounts=on",
        "preallocation=metadata",
        "preallocation=falloc",
        "preallocation=full",
    ] {
        kinds.push(format!(" -o {options}"));
    }
    // Zeroes that are data.
    kinds.push(" -S 0".to_owned());
    for kind in kinds {
        workshop.must(&format!(
            "qemu-img convert -f raw -O qcow2{kind} disk image"
        ));
        let read = read_disk(&workshop.path("image"), MIB).unwrap();
        assert_same(&read, &disk, &kind);
    }
    for piece in [512, 10_000, 64 << 10] {
        let read = read_disk(&workshop.path("image"), piece).unwrap();
        assert_same(&read, &disk, "in other pieces");
    }
}

#[test]
fn holes_zero_clusters_and_snapshots_are_read_as_qemu_reads_them() {
    let test = "holes_zero_clusters_and_snapshots_are_read_as_qemu_reads_them";
    let Some(workshop) = Workshop::or_skip(test, &["qemu-img", "qemu-io"]) else {
        return;
    };
    for cluster in ["4k", "64k", "2M"] {
        workshop.remove("image");
        workshop.must(&format!(
            "qemu-img create -q -f qcow2 -o cluster_size={cluster} image 64M"
        ));
        for step in [
            "qemu-io|-c|write -P 0x11 1M 3M|-c|write -P 0x22 20M 100k|-c|write -z 2M 1M image",
            "qemu-img|snapshot|-c|before image",
            "qemu-io|-c|write -P 0x33 3M 512k|-c|write -z -u 20M 64k|-c|discard 1M 512k image",
            "qemu-img|snapshot|-c|later image",
            "qemu-io|-c|write -P 0x44 40M 5k|-c|write -P 0x55 67108352 512 image",
            "qemu-img|resize|-q image|+1M",
        ] {
            run_step(&workshop, step);
        }
        let wanted = workshop.qemu_reads("image").unwrap();
        assert_eq!(wanted.len(), 65 * MIB);
        assert!(wanted[2 * MIB..3 * MIB].iter().all(|byte| *byte == 0));
        assert_eq!(wanted[3 * MIB], 0x33);
        let read = read_disk(&workshop.path("image"), MIB).unwrap();
        assert_same(&read, &wanted, cluster);
    }
}

/// Words that contain spaces are separated by bars; the last bar-less part is a file.
fn run_step(workshop: &Workshop, step: &str) {
    let mut command = std::process::Command::new(step.split('|').next().unwrap());
    let words = step.split('|').skip(1).flat_map(|word| {
        let file = word.strip_suffix(" image").map(|word| vec![word, "image"]);
        file.unwrap_or_else(|| vec![word])
    });
    let output = command
        .current_dir(workshop.path(""))
        .args(words)
        .output()
        .unwrap();
    assert!(output.status.success(), "{step}: {output:?}");
}

#[test]
fn an_image_that_needs_a_file_a_key_or_a_feature_is_refused_by_name() {
    let test = "an_image_that_needs_a_file_a_key_or_a_feature_is_refused_by_name";
    let Some(workshop) = Workshop::or_skip(test, &["qemu-img"]) else {
        return;
    };
    workshop.write("base", &disk(MIB));
    workshop.write("disk", &disk(MIB));
    let create = "qemu-img create -q -f qcow2";
    for (made, says) in [
        (
            format!("{create} -b base -F raw image"),
            "a backing file (header field backing_file_offset)",
        ),
        (
            format!("{create} -o compat=0.10 -b base -F raw image"),
            "a backing file (header field backing_file_offset)",
        ),
        (
            format!("{create} -o data_file=data image 1M"),
            "an external data file (header field incompatible_features, bit 2)",
        ),
        (
            format!(
                "{create} --object secret,id=key,data=secret -o encrypt.format=aes,encrypt.key-secret=key \
                 image 1M"
            ),
            "is encrypted (header field crypt_method is 1)",
        ),
        (
            format!("{create} -o extended_l2=on image 1M"),
            "extended L2 entries",
        ),
        (
            "qemu-img convert -f raw -O qcow2 -c -o compression_type=zstd disk image".to_owned(),
            "not compressed with zlib",
        ),
    ] {
        workshop.remove("image");
        workshop.must(&made);
        let error = read_disk(&workshop.path("image"), MIB).unwrap_err();
        assert!(error.to_string().contains(says), "{made}: {error}");
    }
}
