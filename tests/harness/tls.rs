//! Certificates made anew, and clients that speak TLS and say what they saw.

use std::io::{BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;

use rustls::crypto::aws_lc_rs;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::sign::CertifiedKey;
use rustls::{
    ClientConfig, ClientConnection, HandshakeKind, ProtocolVersion, RootCertStore, ServerConfig,
    StreamOwned, SupportedProtocolVersion,
};

use super::{DEADLINE, Reply, read_reply};

/// An authority and what it signs, as PEM files.
#[derive(Debug)]
pub struct Authority {
    pub folder: tempfile::TempDir,
}

impl Authority {
    pub fn new() -> Authority {
        let authority = Authority {
            folder: tempfile::tempdir().unwrap(),
        };
        authority.run(
            "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 \
             -keyout ca.key -out ca.crt -subj '/CN=weir test authority'",
        );
        authority
    }

    /// Makes `NAME.crt` and `NAME.key` for these subject alternative names, such as `DNS:a.test,URI:spiffe://a/b`.
    pub fn issue(&self, name: &str, sans: &str) -> PathBuf {
        self.issue_with(name, sans, "-days 2")
    }

    /// Likewise, with options of `openssl x509`.
    pub fn issue_with(&self, name: &str, sans: &str, options: &str) -> PathBuf {
        self.run(&format!(
            "openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout {name}.new -out {name}.csr -subj '/O=weir \"tests\"/CN={name}'
             printf 'subjectAltName={sans}\\nbasicConstraints=CA:FALSE\\n' >{name}.ext
             openssl x509 -req -in {name}.csr -CA ca.crt -CAkey ca.key -CAcreateserial {options} -extfile {name}.ext -out {name}.pem
             mv {name}.new {name}.key; mv {name}.pem {name}.crt"
        ));
        self.path(&format!("{name}.crt"))
    }

    /// As [`Authority::issue`], for so many seconds.
    pub fn issue_for(&self, name: &str, sans: &str, seconds: u32) -> PathBuf {
        self.issue(name, sans);
        self.run(&format!(
            "printf '[ca]\ndefault_ca=any\n[any]\ndatabase=index\nnew_certs_dir=.\ndefault_md=sha256\nrand_serial=yes\nunique_subject=no\npolicy=all\n[all]\norganizationName=optional\ncommonName=supplied\n' >ca.cnf
             : >index
             end=$(date -u -d @$(($(date +%s) + {seconds})) +%Y%m%d%H%M%SZ)
             openssl ca -batch -notext -config ca.cnf -cert ca.crt -keyfile ca.key -in {name}.csr -extfile {name}.ext -enddate $end -out {name}.pem
             mv {name}.pem {name}.crt"
        ));
        self.path(&format!("{name}.crt"))
    }

    /// The certificate of this name, with its key.
    pub fn key(&self, name: &str) -> Arc<CertifiedKey> {
        let chain = CertificateDer::pem_file_iter(self.path(&format!("{name}.crt"))).unwrap();
        let key = PrivateKeyDer::from_pem_file(self.path(&format!("{name}.key"))).unwrap();
        let provider = aws_lc_rs::default_provider();
        let chain = chain.map(Result::unwrap).collect();
        Arc::new(CertifiedKey::from_der(chain, key, &provider).unwrap())
    }

    pub fn path(&self, file: &str) -> PathBuf {
        self.folder.path().join(file)
    }

    /// A certificate as a configuration names it.
    pub fn pair(&self, name: &str) -> String {
        let (cert, key) = (
            self.path(&format!("{name}.crt")),
            self.path(&format!("{name}.key")),
        );
        format!("{{cert: '{}', key: '{}'}}", cert.display(), key.display())
    }

    pub fn run(&self, script: &str) {
        let output = Command::new("sh")
            .args(["-ec", script])
            .current_dir(&self.folder)
            .output()
            .unwrap();
        assert!(
            output.status.success(),
            "openssl, which these tests need and `make test` installs by apt: {output:?}"
        );
    }

    /// A client that believes this authority alone.
    pub fn client(&self) -> Tls {
        let mut roots = RootCertStore::empty();
        for certificate in CertificateDer::pem_file_iter(self.path("ca.crt")).unwrap() {
            roots.add(certificate.unwrap()).unwrap();
        }
        Tls::new(roots, rustls::ALL_VERSIONS, None)
    }

    /// As [`Authority::client`], that shows the certificate of this name, which may be another authority's.
    pub fn client_showing(&self, of: &Authority, name: &str) -> Tls {
        let chain = CertificateDer::pem_file_iter(of.path(&format!("{name}.crt"))).unwrap();
        let chain = chain.map(Result::unwrap).collect();
        let key = PrivateKeyDer::from_pem_file(of.path(&format!("{name}.key"))).unwrap();
        let plain = self.client();
        Tls::new(plain.roots, rustls::ALL_VERSIONS, Some((chain, key)))
    }

    /// How a server speaks TLS that shows the certificate of this name.
    pub fn server(&self, name: &str) -> ServerConfig {
        let provider = Arc::new(aws_lc_rs::default_provider());
        let chain = CertificateDer::pem_file_iter(self.path(&format!("{name}.crt"))).unwrap();
        let key = PrivateKeyDer::from_pem_file(self.path(&format!("{name}.key"))).unwrap();
        ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(chain.map(Result::unwrap).collect(), key)
            .unwrap()
    }

    /// As [`Authority::client`], of this version alone.
    pub fn client_of(&self, version: &'static SupportedProtocolVersion) -> Tls {
        Tls::new(self.client().roots, &[version], None)
    }
}

/// Makes `NAME.crt`, which has signed itself and is for `localhost`, and `NAME.key`.
pub fn self_signed(name: &str) -> String {
    format!(
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -keyout {name}.key -out {name}.crt \
         -subj '/CN={name}' -addext 'subjectAltName=DNS:localhost'"
    )
}

/// How a client speaks TLS.
#[derive(Debug, Clone)]
pub struct Tls {
    roots: RootCertStore,
    pub config: ClientConfig,
}

type Shown = (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>);

impl Tls {
    fn new(
        roots: RootCertStore,
        versions: &[&'static SupportedProtocolVersion],
        shown: Option<Shown>,
    ) -> Tls {
        let provider = Arc::new(aws_lc_rs::default_provider());
        let builder = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(versions)
            .unwrap()
            .with_root_certificates(roots.clone());
        let config = match shown {
            Some((chain, key)) => builder.with_client_auth_cert(chain, key).unwrap(),
            None => builder.with_no_client_auth(),
        };
        Tls { roots, config }
    }

    pub fn offering(mut self, protocols: &[&str]) -> Tls {
        self.config.alpn_protocols = protocols
            .iter()
            .map(|name| name.as_bytes().to_vec())
            .collect();
        self
    }

    /// A connection of which nothing was said yet.
    pub fn begin(&self, name: &str) -> ClientConnection {
        let name = ServerName::try_from(name.to_owned()).unwrap();
        ClientConnection::new(Arc::new(self.config.clone()), name).unwrap()
    }

    /// What a client begins with.
    pub fn hello(&self, name: &str) -> Vec<u8> {
        let mut tls = self.begin(name);
        let mut hello = Vec::new();
        tls.write_tls(&mut hello).unwrap();
        hello
    }

    /// A connection to `address`, asking for `name`, once both ends agree; or what was said against it.
    pub fn try_connect(&self, address: &str, name: &str) -> Result<TlsClient, String> {
        let tcp = TcpStream::connect(address).unwrap();
        tcp.set_read_timeout(Some(DEADLINE)).unwrap();
        self.try_over(tcp, name)
    }

    /// Likewise, over this connection.
    pub fn try_over(&self, mut tcp: TcpStream, name: &str) -> Result<TlsClient, String> {
        let name = ServerName::try_from(name.to_owned()).unwrap();
        let mut tls = ClientConnection::new(Arc::new(self.config.clone()), name).unwrap();
        while tls.is_handshaking() {
            tls.complete_io(&mut tcp)
                .map_err(|error| error.to_string())?;
        }
        Ok(TlsClient {
            reader: BufReader::new(StreamOwned::new(tls, tcp)),
        })
    }

    pub fn connect(&self, address: &str, name: &str) -> TlsClient {
        self.try_connect(address, name).unwrap()
    }
}

/// A keep-alive connection under TLS.
pub struct TlsClient {
    reader: BufReader<StreamOwned<ClientConnection, TcpStream>>,
}

impl TlsClient {
    pub fn get(&mut self, path: &str) -> Reply {
        self.try_get(path, &[]).unwrap()
    }

    /// With these field lines; or why there was no reply.
    pub fn try_get(&mut self, path: &str, fields: &[&str]) -> Result<Reply, String> {
        let mut request = format!("GET {path} HTTP/1.1\r\nHost: test\r\n");
        for field in fields {
            request.push_str(field);
            request.push_str("\r\n");
        }
        request.push_str("\r\n");
        self.try_ask(&request)
    }

    /// The answer to a request, as it is on the wire; or why there was none.
    pub fn try_ask(&mut self, request: &str) -> Result<Reply, String> {
        self.write(request)?;
        let said = |error: std::io::Error| error.to_string();
        match std::io::BufRead::fill_buf(&mut self.reader).map_err(said)? {
            [] => Err("closed".to_owned()),
            _ => Ok(read_reply(&mut self.reader, true)),
        }
    }

    pub fn write(&mut self, text: &str) -> Result<(), String> {
        let written = self.reader.get_mut().write_all(text.as_bytes());
        written.map_err(|error| error.to_string())
    }

    /// All that comes until the end; an error where it is cut off.
    pub fn read_to_end(&mut self) -> Result<String, String> {
        let mut text = String::new();
        let read = self.reader.read_to_string(&mut text);
        read.map(|_| text).map_err(|error| error.to_string())
    }

    /// All that comes until the end, whichever that is.
    pub fn rest(&mut self) -> Vec<u8> {
        let mut bytes = Vec::new();
        let _ = self.reader.read_to_end(&mut bytes);
        bytes
    }

    pub fn resumed(&self) -> bool {
        self.reader.get_ref().conn.handshake_kind() == Some(HandshakeKind::Resumed)
    }

    pub fn version(&self) -> ProtocolVersion {
        self.reader.get_ref().conn.protocol_version().unwrap()
    }

    pub fn agreed(&self) -> Option<String> {
        let agreed = self.reader.get_ref().conn.alpn_protocol()?;
        Some(String::from_utf8(agreed.to_vec()).unwrap())
    }

    /// The certificate that was shown.
    pub fn shown(&self) -> Vec<u8> {
        self.reader.get_ref().conn.peer_certificates().unwrap()[0].to_vec()
    }
}

/// The first certificate of a file.
pub fn der(path: PathBuf) -> Vec<u8> {
    CertificateDer::from_pem_file(path).unwrap().to_vec()
}
