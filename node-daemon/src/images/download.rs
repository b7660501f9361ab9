//! A packed image as it comes from its source: counted, bounded and hashed.

use std::fs::File;
use std::io::{self, Read};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context, Result};
use bascule_types::{RedactedUrl, SourceAuthorization};

use super::fetch::FetchJob;
use super::fetcher::start_fetcher;
use super::image_hash::ImageHash;
use super::job::{ImportJob, JobSource};
use super::length_limit::LengthLimit;
use super::read_full::read_full;
use super::worker::Worker;

/// The bytes of an image, as they come.
pub(super) struct Download {
    source: Box<dyn Read + Send>,
    limit: LengthLimit,
    hash: Option<ImageHash>,
    /// Bytes that have come; the writer reports them.
    count: Arc<AtomicU64>,
    /// What was read ahead and not yet taken.
    ahead: Vec<u8>,
}

/// Where the image comes from, beside its bytes.
pub(super) struct Origin {
    fetcher: Option<Worker>,
    /// For messages about the hash.
    place: String,
    /// A file that can be read at any place.
    pub(super) file: Option<File>,
}

impl Download {
    /// Opens the job's source, with the header that its server wants.
    pub(super) fn open(
        job: &ImportJob,
        limit: LengthLimit,
        authorization: Option<SourceAuthorization>,
    ) -> Result<(Self, Origin)> {
        let mut origin = Origin {
            fetcher: None,
            place: String::new(),
            file: None,
        };
        let mut hash = None;
        let source: Box<dyn Read + Send> = match &job.source {
            JobSource::Blank => Box::new(io::empty()),
            JobSource::File { path } => {
                let file = File::open(path).with_context(|| format!("open {}", path.display()))?;
                let metadata = file.metadata().context("measure the file")?;
                limit.check_packed(metadata.len())?;
                if metadata.is_file() {
                    origin.file = Some(file.try_clone().context("share the file")?);
                }
                Box::new(file)
            }
            JobSource::Http {
                url,
                digest,
                ca_bundle,
                authorization_from: _,
            } => {
                let (image, fetcher) = start_fetcher(&FetchJob {
                    parent: std::process::id(),
                    url: url.clone(),
                    limit,
                    ca_bundle: ca_bundle.clone(),
                    authorization,
                    site: job.site.clone(),
                })?;
                hash = Some(ImageHash::new(digest));
                origin.fetcher = Some(fetcher);
                origin.place = RedactedUrl(url).to_string();
                Box::new(image)
            }
        };
        let download = Self {
            source,
            limit,
            hash,
            count: Arc::default(),
            ahead: Vec::new(),
        };
        Ok((download, origin))
    }

    /// Bytes that have come so far, also while another thread reads.
    pub(super) fn count(&self) -> Arc<AtomicU64> {
        Arc::clone(&self.count)
    }

    /// The first `length` bytes, or all of a shorter image; they stay to be read.
    pub(super) fn peek(&mut self, length: usize) -> Result<Vec<u8>> {
        let mut head = vec![0; length];
        let found = self.read(&mut head)?;
        head.truncate(found);
        self.ahead.clone_from(&head);
        Ok(head)
    }

    /// Reads until the buffer is full or the image ends.
    pub(super) fn read(&mut self, into: &mut [u8]) -> Result<usize> {
        let taken = self.ahead.len().min(into.len());
        let (begin, rest) = into.split_at_mut(taken);
        begin.copy_from_slice(self.ahead.get(..taken).unwrap_or_default());
        self.ahead.drain(..taken);
        let fresh = read_full(&mut self.source, rest).context("read the image")?;
        let count = self.count.fetch_add(fresh as u64, Ordering::Relaxed) + fresh as u64;
        self.limit.check_packed(count)?;
        if let Some(hash) = &mut self.hash {
            hash.update(rest.get(..fresh).unwrap_or_default());
        }
        Ok(taken + fresh)
    }

    /// Reads the rest, and fails unless the source has given all of the image, with the right hash.
    pub(super) fn finish(mut self, origin: Origin) -> Result<()> {
        // A file has no hash, and a qcow2 image in one is not read through.
        if origin.fetcher.is_some() {
            let mut rest = vec![0; REST_BYTES];
            while self.read(&mut rest)? > 0 {}
        }
        if let Some(fetcher) = origin.fetcher {
            fetcher.finish()?;
        }
        match self.hash {
            Some(hash) => hash.check(&origin.place),
            None => Ok(()),
        }
    }
}

const REST_BYTES: usize = 64 << 10;
