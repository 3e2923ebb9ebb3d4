//! A VMM of another process that lets a page server fill its RAM, for tests. It is written from the
//! description of Firecracker's page-fault protocol, and uses no code of the server.
//!
//! A test file has one test that is the client, and starts it in a process of its own:
//! ```no_run
//! use page_client::{Client, Memory};
//!
//! #[test]
//! fn page_client() {
//!     page_client::run();
//! }
//!
//! # fn main() {
//! let mut client = Client::spawn("page_client");
//! client.map(&Memory::private([1 << 20]));
//! client.connect("/run/pages.sock".as_ref());
//! assert_eq!(client.read(4096, 1), Ok(vec![7]));
//! # }
//! ```
#![cfg(target_os = "linux")]
#![allow(
    clippy::missing_panics_doc,
    reason = "a client that does not do what it should is a failed test"
)]

mod bare;
mod child;
mod client;
#[cfg(target_arch = "x86_64")]
mod guest;
mod memory;
mod request;
mod socket;
mod vmm;

pub use bare::serve_bare;
pub use child::run;
pub use client::Client;
pub use request::{Memory, Message, Sent};
pub use vmm::Vmm;
