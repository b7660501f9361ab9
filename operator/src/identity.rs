//! The operator's own certificate, as server (Join) and as client of the node daemons. Issued on first
//! use, and renewed when a third of its validity is left.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result};
use bascule_pki::{Authority, Identity, validity};
use time::OffsetDateTime;

/// The operator's certificate and key for one set of host names, cached in memory.
pub(crate) struct OwnIdentity {
    authority: Arc<Authority>,
    hosts: Vec<String>,
    clock: Box<dyn Fn() -> OffsetDateTime + Send + Sync>,
    present: Mutex<Option<Identity>>,
}

impl OwnIdentity {
    /// `hosts` are additional subject alternative names.
    pub(crate) fn new(authority: Arc<Authority>, hosts: Vec<String>) -> Self {
        Self::with_clock(authority, hosts, OffsetDateTime::now_utc)
    }

    /// Like `new`, with a clock that tests control.
    pub(crate) fn with_clock(
        authority: Arc<Authority>,
        hosts: Vec<String>,
        clock: impl Fn() -> OffsetDateTime + Send + Sync + 'static,
    ) -> Self {
        Self {
            authority,
            hosts,
            clock: Box::new(clock),
            present: Mutex::new(None),
        }
    }

    /// The certificate and key for a handshake that begins now; issues them first when they are due.
    pub(crate) fn get(&self) -> Result<Identity> {
        let mut present = self.present.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(identity) = &*present
            && !self.is_due(identity)?
        {
            return Ok(identity.clone());
        }
        let identity = self
            .authority
            .issue_operator(&self.hosts)
            .context("issue the operator's certificate")?;
        tracing::info!("issued the operator's certificate");
        *present = Some(identity.clone());
        Ok(identity)
    }

    /// Whether `identity` is due for renewal.
    pub(crate) fn is_due(&self, identity: &Identity) -> Result<bool> {
        let (_, due) = validity(&identity.certificate_pem, (self.clock)())
            .context("read the operator's certificate")?;
        Ok(due)
    }

    /// Discards the cached certificate, so that the next `get` issues a new one.
    pub(crate) fn forget(&self) {
        *self.present.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    pub(crate) fn authority(&self) -> &Authority {
        &self.authority
    }
}

impl fmt::Debug for OwnIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OwnIdentity")
            .field("hosts", &self.hosts)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::sync::atomic::{AtomicI64, Ordering};

    use super::*;

    /// An identity, and the number of days by which its clock runs ahead of real time.
    pub(crate) fn with_days_ahead() -> (OwnIdentity, Arc<AtomicI64>) {
        let (authority, _) = Authority::create("test").unwrap();
        let days = Arc::new(AtomicI64::new(0));
        let ahead = Arc::clone(&days);
        let clock =
            move || OffsetDateTime::now_utc() + time::Duration::days(ahead.load(Ordering::Relaxed));
        let identity = OwnIdentity::with_clock(Arc::new(authority), vec![], clock);
        (identity, days)
    }

    #[test]
    fn a_certificate_is_reused_until_a_third_of_its_validity_is_left() {
        let (own, days) = with_days_ahead();
        let first = own.get().unwrap();
        assert_eq!(own.get().unwrap().certificate_pem, first.certificate_pem);
        days.store(50, Ordering::Relaxed);
        assert_eq!(own.get().unwrap().certificate_pem, first.certificate_pem);
        days.store(61, Ordering::Relaxed);
        assert!(own.is_due(&first).unwrap());
        assert_ne!(own.get().unwrap().certificate_pem, first.certificate_pem);
    }
}
