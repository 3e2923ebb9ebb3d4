//! The kinds of guests, and which of them this host supports.

use std::fmt;

use anyhow::Context;
use clap::ValueEnum;

use super::embedded::{Embedded, Tracking};
use super::guest::Guest;
use super::ledger::Layout;

/// A kind of guest; the best first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Kind {
    /// A KVM virtual machine (Linux on x86-64): writes tracked by its dirty log
    Kvm,
    /// A virtual machine of Apple's Hypervisor framework (macOS on Apple silicon): writes tracked
    /// by stage-2 protection
    Hvf,
    /// A part of this process (Linux): writes tracked by userfaultfd write-protection
    Userfaultfd,
    /// A part of this process (any Unix): writes tracked by mprotect and a signal handler
    Mprotect,
}

impl Kind {
    /// Returns the best kind of guest on this host, and why the better ones are not available.
    pub fn best() -> (Self, Vec<String>) {
        let mut why_not = Vec::new();
        for kind in [Self::Kvm, Self::Hvf, Self::Userfaultfd] {
            match kind.available() {
                Ok(()) => return (kind, why_not),
                Err(error) => why_not.push(format!("{error:#}")),
            }
        }
        (Self::Mprotect, why_not)
    }

    /// Creates a guest of this kind with empty memory.
    pub fn create(self, layout: Layout) -> anyhow::Result<Box<dyn Guest>> {
        let guest: anyhow::Result<Box<dyn Guest>> = match self {
            #[cfg(all(target_os = "linux", target_arch = "x86_64"))]
            Self::Kvm => super::kvm::Machine::new(layout).map(|guest| Box::new(guest) as _),
            #[cfg(all(target_os = "macos", target_arch = "aarch64"))]
            Self::Hvf => super::hvf::Machine::new(layout).map(|guest| Box::new(guest) as _),
            #[cfg(target_os = "linux")]
            Self::Userfaultfd => {
                Embedded::new(layout, Tracking::Userfaultfd).map(|guest| Box::new(guest) as _)
            }
            Self::Mprotect => {
                Embedded::new(layout, Tracking::Mprotect).map(|guest| Box::new(guest) as _)
            }
            // The kinds of other hosts; no host has all kinds.
            kind => kind.available().and_then(|()| unreachable!()),
        };
        guest.with_context(|| format!("failed to create a guest in {self}"))
    }

    /// Checks that this host supports this kind of guest.
    fn available(self) -> anyhow::Result<()> {
        match self {
            #[cfg(all(target_os = "linux", target_arch = "x86_64"))]
            Self::Kvm => super::kvm::available(),
            #[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
            Self::Kvm => anyhow::bail!("KVM guests require Linux on x86-64"),
            #[cfg(all(target_os = "macos", target_arch = "aarch64"))]
            Self::Hvf => super::hvf::available(),
            #[cfg(not(all(target_os = "macos", target_arch = "aarch64")))]
            Self::Hvf => anyhow::bail!("the Hypervisor framework requires macOS on Apple silicon"),
            #[cfg(target_os = "linux")]
            Self::Userfaultfd => {
                write_faults::open_userfaultfd()?;
                Ok(())
            }
            #[cfg(not(target_os = "linux"))]
            Self::Userfaultfd => anyhow::bail!("userfaultfd requires Linux"),
            Self::Mprotect => Ok(()),
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Kvm => "a KVM virtual machine (x86-64, long mode), tracked by KVM's dirty log",
            Self::Hvf => {
                "a virtual machine of the Hypervisor framework (arm64), tracked by stage-2 write \
                 protection"
            }
            Self::Userfaultfd => "this process, tracked by userfaultfd write-protection",
            Self::Mprotect => "this process, tracked by mprotect and its signal",
        })
    }
}
