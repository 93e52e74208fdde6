//! The public authorities of the system, which are believed where the configuration names none. Must not watch them.

use std::cell::OnceCell;
use std::fmt;
use std::sync::Arc;

use rustls::RootCertStore;
use rustls_native_certs::{CertificateResult, load_native_certs};
use sha2::{Digest, Sha256};

/// The authorities, as they were when they were read. Those that cannot be read are left out: a system has more than anyone needs.
pub(super) struct Public {
    pub roots: Arc<RootCertStore>,
    /// What they are, in short.
    pub digest: [u8; 32],
    /// Of those that were left out.
    errors: Vec<String>,
}

impl fmt::Debug for Public {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Public")
    }
}

impl From<CertificateResult> for Public {
    fn from(found: CertificateResult) -> Public {
        let mut digest = Sha256::new();
        for certificate in &found.certs {
            digest.update(certificate.len().to_be_bytes());
            digest.update(certificate);
        }
        let mut roots = RootCertStore::empty();
        roots.add_parsable_certificates(found.certs);
        Public {
            roots: Arc::new(roots),
            digest: digest.finalize().into(),
            errors: found.errors.iter().map(ToString::to_string).collect(),
        }
    }
}

/// The authorities for all that is read at a time: looked for once, and only if someone asks.
pub(super) struct PublicOnce {
    load: fn() -> CertificateResult,
    old: Option<Arc<Public>>,
    found: OnceCell<(Arc<Public>, Option<String>)>,
}

impl PublicOnce {
    /// In place of `old`, which stays where they are worse than that.
    pub(super) fn after(old: Option<Arc<Public>>) -> PublicOnce {
        PublicOnce {
            load: load_native_certs,
            old,
            found: OnceCell::new(),
        }
    }

    pub(super) fn get(&self) -> &Arc<Public> {
        &self.found().0
    }

    /// Why those before stay; `None` as well where nobody has asked for them.
    pub(super) fn error(&self) -> Option<&str> {
        self.found.get()?.1.as_deref()
    }

    fn found(&self) -> &(Arc<Public>, Option<String>) {
        self.found.get_or_init(|| {
            let new = Public::from((self.load)());
            let Some(old) = &self.old else {
                return (Arc::new(new), None);
            };
            // What never could be read is no reason to go by the old for ever; what could, may be half-written just now.
            let is_new = |error: &&String| !old.errors.contains(error);
            let error = match new.errors.iter().find(is_new) {
                Some(error) => error.clone(),
                None if new.roots.is_empty() && !old.roots.is_empty() => {
                    "there are none".to_owned()
                }
                None => return (Arc::new(new), None),
            };
            (old.clone(), Some(error))
        })
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::io;

    use rustls::pki_types::CertificateDer;
    use rustls_native_certs::{Error, ErrorKind};

    use super::*;

    thread_local! {
        static LOADS: Cell<usize> = const { Cell::new(0) };
    }

    fn found(certificate: &[u8], broken: &[&str]) -> CertificateResult {
        let error = |path: &&str| Error {
            context: "failed to open file",
            kind: ErrorKind::Io {
                inner: io::ErrorKind::PermissionDenied.into(),
                path: path.into(),
            },
        };
        let mut found = CertificateResult::default();
        found.certs = vec![CertificateDer::from(certificate.to_vec())];
        found.errors = broken.iter().map(error).collect();
        found
    }

    #[test]
    fn they_are_looked_for_once_and_only_if_someone_asks() {
        let mut once = PublicOnce::after(None);
        once.load = || {
            LOADS.set(LOADS.get() + 1);
            CertificateResult::default()
        };
        assert_eq!((once.error(), LOADS.get()), (None, 0));
        assert!(Arc::ptr_eq(once.get(), once.get()));
        assert_eq!((once.error(), LOADS.get()), (None, 1));
    }

    #[test]
    fn those_before_stay_where_more_cannot_be_read_than_then() {
        let after = |broken: &[&str], load| {
            let old = Arc::new(Public::from(found(b"old", broken)));
            let mut once = PublicOnce::after(Some(old.clone()));
            once.load = load;
            let stays = Arc::ptr_eq(once.get(), &old);
            (stays, once.error().map(str::to_owned))
        };
        let a = "failed to open file: permission denied at 'a'";
        let b = "failed to open file: permission denied at 'b'";
        assert_eq!(after(&[], || found(b"new", &[])), (false, None));
        let stays = (true, Some(a.to_owned()));
        assert_eq!(after(&[], || found(b"new", &["a"])), stays);
        // As it was at the start.
        assert_eq!(after(&["a"], || found(b"new", &["a"])), (false, None));
        assert_eq!(after(&["a"], || found(b"new", &[])), (false, None));
        let stays = (true, Some(b.to_owned()));
        assert_eq!(after(&["a"], || found(b"new", &["a", "b"])), stays);
    }
}
