//! PgBouncer in front of a Postgres server, as its own configuration has it: a connection is a client's until that ends it
//! (`pool_mode = session`), and startup parameters that it does not know are refused.

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt as _;
use std::process::{Child, Command, Stdio};

use super::eventually;
use super::postgres::Server;
use super::redis::free_port;

/// Ends it with whoever began it. As root it becomes the user `postgres`, since it refuses to be root.
const KEEPER: &str = r#"
PATH=$PATH:/usr/sbin
user=
test "$(id -u)" != 0 || user='-u postgres'
pgbouncer -q $user "$1" &
read -r _
kill "$!"
wait
"#;

pub struct Pooler {
    port: u16,
    _folder: tempfile::TempDir,
    _shell: Child,
}

impl Pooler {
    pub fn to(server: &Server) -> Pooler {
        Pooler::by("session", server)
    }

    /// Whose `pool_mode` is this.
    pub fn by(mode: &str, server: &Server) -> Pooler {
        let folder = tempfile::tempdir().unwrap();
        let (port, file) = (free_port(), folder.path().join("pgbouncer.ini"));
        let text = format!(
            "[databases]\n* = host=127.0.0.1 port={} user=postgres\n[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\n\
             unix_socket_dir =\nauth_type = any\npool_mode = {mode}\n",
            server.port
        );
        std::fs::write(&file, text).unwrap();
        std::fs::set_permissions(folder.path(), Permissions::from_mode(0o755)).unwrap();
        let shell = Command::new("sh")
            .args(["-c", KEEPER, "sh"])
            .arg(&file)
            .stdin(Stdio::piped())
            .spawn();
        eventually(|| std::net::TcpStream::connect(("127.0.0.1", port)).is_ok());
        Pooler {
            port,
            _folder: folder,
            _shell: shell.unwrap(),
        }
    }

    pub fn url_of(&self, database: &str) -> String {
        let port = self.port;
        format!("postgres://postgres@127.0.0.1:{port}/{database}?sslmode=disable")
    }
}
