//! TLS towards clients: certificates by name, clients' certificates, and what resumes sessions.

use std::collections::HashMap;
use std::fmt;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use rustls::crypto::aws_lc_rs::Ticketer;
use rustls::server::danger::ClientCertVerifier;
use rustls::server::{
    ClientHello, ProducesTickets, ResolvesServerCert, ServerSessionMemoryCache,
    StoresServerSessions, WebPkiClientVerifier,
};
use rustls::sign::CertifiedKey;
use rustls::version::{TLS12, TLS13};
use rustls::{ServerConfig, ServerConnection, SignatureScheme};
use sha2::{Digest, Sha256};

use super::facts::OwnFacts;
use super::resumption::{NotesEnds, Remembered, Tickets};
use super::{
    Authorities, ClientCertificate, ClientFacts, Protocol, TlsError, authorities, in_file, pair,
    provider, read, unusable,
};
use crate::config::listeners::ListenerProtocol;
use crate::config::tls::{Certificate, ClientAuth, ListenerTls, Version};

/// Sessions that are remembered for clients that take no tickets, which are few.
const REMEMBERED: usize = 1024;

/// What a listener greets by, as its files were when they were read.
#[derive(Debug)]
pub struct ServerTls {
    pub config: Arc<ServerConfig>,
    chooser: Arc<Chooser>,
    admission: Admission,
    resumption: Resumption,
}

/// Which clients are let in.
#[derive(Debug, Clone)]
struct Admission {
    /// Of whom is believed, and of whether certificates are asked for.
    rules: [u8; 32],
    /// `None` where none are.
    verifier: Option<Arc<dyn ClientCertVerifier>>,
}

/// What sessions are resumed by.
#[derive(Clone)]
struct Resumption {
    /// Of an [`Admission`]: who was let in by others is greeted anew.
    rules: [u8; 32],
    tickets: Arc<dyn ProducesTickets>,
    remembered: Arc<dyn StoresServerSessions>,
}

impl ServerTls {
    /// Reads the files of `settings`. Sessions that `old` began are resumed, unless clients are admitted by other rules now.
    pub fn read(
        settings: &ListenerTls,
        protocol: ListenerProtocol,
        old: Option<&ServerTls>,
    ) -> Result<ServerTls, TlsError> {
        let all = settings.certificates.iter().map(Own::read);
        let chooser = Chooser::of(all.collect::<Result<_, _>>()?);
        let admission = Admission::read(&settings.client_auth)?;
        ServerTls::make(settings, protocol, chooser, admission, old)
    }

    /// What the files of the same `settings` hold now, if anything can be made of it. A certificate that cannot be used is as before, as is
    /// whom clients are to be signed by. And what is wrong with each.
    pub fn renewed(
        &self,
        settings: &ListenerTls,
        protocol: ListenerProtocol,
    ) -> (Option<ServerTls>, Vec<TlsError>) {
        let mut wrong = Vec::new();
        let pairs = settings.certificates.iter().zip(&self.chooser.all);
        let all = pairs.map(|(files, before)| {
            Own::read(files).unwrap_or_else(|error| {
                wrong.push(error);
                before.clone()
            })
        });
        let chooser = Chooser::of(all.collect());
        let admission = Admission::read(&settings.client_auth).unwrap_or_else(|error| {
            wrong.push(error);
            self.admission.clone()
        });
        let made = ServerTls::make(settings, protocol, chooser, admission, Some(self));
        let made = made.map_err(|error| wrong.push(error)).ok();
        (made, wrong)
    }

    fn make(
        settings: &ListenerTls,
        protocol: ListenerProtocol,
        chooser: Chooser,
        admission: Admission,
        old: Option<&ServerTls>,
    ) -> Result<ServerTls, TlsError> {
        let chooser = Arc::new(chooser);
        let versions = match settings.min_version {
            Version::Tls12 => &[&TLS13, &TLS12][..],
            Version::Tls13 => &[&TLS13],
        };
        let builder = ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(versions)
            .map_err(unusable)?;
        let builder = match &admission.verifier {
            None => builder.with_no_client_auth(),
            Some(verifier) => builder.with_client_cert_verifier(verifier.clone()),
        };
        let resumption = match old.filter(|old| old.resumption.rules == admission.rules) {
            Some(old) => old.resumption.clone(),
            None => Resumption::new(admission.rules, &settings.client_auth)?,
        };
        let mut config = builder.with_cert_resolver(chooser.clone());
        config.ticketer = resumption.tickets.clone();
        config.session_storage = resumption.remembered.clone();
        config.alpn_protocols = alpn(protocol).iter().map(|name| name.to_vec()).collect();
        Ok(ServerTls {
            config: Arc::new(config),
            chooser,
            admission,
            resumption,
        })
    }

    /// Whether the same clients are let in as by `other`.
    pub fn admits_as(&self, other: &ServerTls) -> bool {
        self.admission.rules == other.admission.rules
    }

    /// What is known once both ends agree.
    pub fn facts(&self, connection: &ServerConnection) -> (ClientFacts, Option<Protocol>) {
        let sni = connection.server_name();
        let certificate = connection.peer_certificates().and_then(<[_]>::first);
        let certificate = certificate.map(|der| {
            let by = self
                .chooser
                .named(sni)
                .next()
                .and_then(|own| own.facts.uri.as_deref());
            ClientCertificate::new(der, by)
        });
        let facts = ClientFacts {
            sni: sni.map(str::to_owned),
            certificate,
        };
        (facts, connection.alpn_protocol().and_then(Protocol::of))
    }

    /// The files of the certificates that clients are shown, and from when till when each holds, since the epoch.
    pub fn certificates(&self) -> impl Iterator<Item = (String, Range<Duration>)> {
        let holds = |own: &Own| (own.file.display().to_string(), own.facts.holds.clone());
        self.chooser.all.iter().map(holds)
    }
}

/// What is offered to clients, the best first. HTTP/1.0 is spoken, too, and some of its clients offer nothing else.
fn alpn(protocol: ListenerProtocol) -> &'static [&'static [u8]] {
    match protocol {
        ListenerProtocol::Auto => &[b"h2", b"http/1.1", b"http/1.0"],
        ListenerProtocol::Http1 => &[b"http/1.1", b"http/1.0"],
        ListenerProtocol::Http2 => &[b"h2"],
    }
}

impl Admission {
    fn read(asks: &ClientAuth) -> Result<Admission, TlsError> {
        let mut rules = Sha256::new();
        let verifier = match asks {
            ClientAuth::None => None,
            ClientAuth::Optional(ca) | ClientAuth::Required(ca) => {
                let Authorities { roots, held } = authorities(ca)?;
                let roots = Arc::new(roots);
                let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider());
                let verifier = match asks {
                    ClientAuth::Required(_) => verifier,
                    ClientAuth::Optional(_) | ClientAuth::None => {
                        rules.update(b"optional");
                        verifier.allow_unauthenticated()
                    }
                };
                rules.update(read(ca)?);
                let signed = verifier.build().map_err(|error| in_file(ca, error))?;
                Some(Arc::new(NotesEnds { held, signed }) as Arc<dyn ClientCertVerifier>)
            }
        };
        Ok(Admission {
            rules: rules.finalize().into(),
            verifier,
        })
    }
}

impl Resumption {
    fn new(rules: [u8; 32], asks: &ClientAuth) -> Result<Resumption, TlsError> {
        let tickets = Ticketer::new().map_err(unusable)?;
        let remembered = ServerSessionMemoryCache::new(REMEMBERED);
        Ok(match asks {
            ClientAuth::None => Resumption {
                rules,
                tickets,
                remembered,
            },
            ClientAuth::Optional(_) | ClientAuth::Required(_) => Resumption {
                rules,
                tickets: Arc::new(Tickets(tickets)),
                remembered: Arc::new(Remembered(remembered)),
            },
        })
    }
}

impl fmt::Debug for Resumption {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Resumption")
    }
}

/// Chooses by the name that a client asks for: an exact one before a wildcard, which stands for one label; the first
/// certificate where none has the name.
#[derive(Debug)]
struct Chooser {
    /// In the file's order.
    all: Vec<Own>,
    /// Indexes of `all`, in its order: one name may have certificates of several kinds.
    exact: HashMap<String, Vec<usize>>,
    /// Likewise, by what stands behind `*.`.
    wildcard: HashMap<String, Vec<usize>>,
}

#[derive(Debug, Clone)]
struct Own {
    file: PathBuf,
    key: Arc<CertifiedKey>,
    facts: OwnFacts,
}

impl Own {
    fn read(files: &Certificate) -> Result<Own, TlsError> {
        let key = pair(&files.cert, &files.key)?;
        let facts = OwnFacts::of(&key.cert[0]).map_err(|error| in_file(&files.cert, error))?;
        Ok(Own {
            file: files.cert.clone(),
            key: Arc::new(key),
            facts,
        })
    }
}

impl Chooser {
    fn of(all: Vec<Own>) -> Chooser {
        let (mut exact, mut wildcard) = (HashMap::<_, Vec<_>>::new(), HashMap::<_, Vec<_>>::new());
        for (index, own) in all.iter().enumerate() {
            for name in &own.facts.dns_names {
                let (names, name) = match name.strip_prefix("*.") {
                    Some(behind) => (&mut wildcard, behind),
                    None => (&mut exact, name.as_str()),
                };
                names.entry(name.to_owned()).or_default().push(index);
            }
        }
        Chooser {
            all,
            exact,
            wildcard,
        }
    }

    /// Those for a name, the best first; those for no name in the file's order.
    fn named(&self, name: Option<&str>) -> impl Iterator<Item = &Own> {
        let found = name.and_then(|name| {
            let name = name.to_ascii_lowercase();
            let wild = || self.wildcard.get(name.split_once('.')?.1);
            self.exact.get(&name).or_else(wild)
        });
        let indexes = found.map(Vec::as_slice);
        let default = match indexes {
            Some(_) => &[],
            None => &self.all[..],
        };
        let indexes = indexes.unwrap_or_default().iter();
        indexes.map(|index| &self.all[*index]).chain(default)
    }

    fn choose(&self, name: Option<&str>, known: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        let mut named = self.named(name);
        let fits = |own: &&Own| own.key.key.choose_scheme(known).is_some();
        named.find(fits).map(|own| own.key.clone())
    }
}

impl ResolvesServerCert for Chooser {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        self.choose(hello.server_name(), hello.signature_schemes())
    }
}
