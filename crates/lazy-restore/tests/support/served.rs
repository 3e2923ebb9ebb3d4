//! A page server in this process, and a client in another one.

use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::time::Duration;

use lazy_restore::{PageServer, PageServerOptions, RefusedClient, ServedVm};
use memory_image::VerifiedChain;
use page_client::{Client, Memory};
use test_images::Images;

pub const PAGE: u64 = 4096;
pub const MIB: u64 = 1 << 20;

/// A server that listens on a socket.
pub struct Listening {
    pub server: PageServer,
    listener: UnixListener,
    pub socket: PathBuf,
    _dir: tempfile::TempDir,
}

impl Listening {
    pub fn new(images: &Images, options: &PageServerOptions) -> Self {
        let chain = VerifiedChain::new(super::open_chain(images));
        Self::with(options.source(chain).unwrap())
    }

    pub fn with(server: PageServer) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("pages.sock");
        Self {
            server,
            listener: UnixListener::bind(&socket).unwrap(),
            socket,
            _dir: dir,
        }
    }

    /// Serves the next client.
    pub fn serve(&self) -> Result<ServedVm, RefusedClient> {
        let (connection, _) = self.listener.accept().unwrap();
        self.server.serve(connection)
    }

    /// Starts a client with this memory, and serves it.
    pub fn serve_client(&self, memory: &Memory) -> (Client, ServedVm) {
        let mut client = Client::spawn("page_client");
        client.map(memory);
        client.connect(&self.socket);
        let vm = self.serve().unwrap();
        (client, vm)
    }
}

/// Options with which every page waits for an access.
pub fn on_demand() -> PageServerOptions {
    let limit = Duration::from_secs(600);
    PageServer::options().prefetch(false).handshake_limit(limit)
}
