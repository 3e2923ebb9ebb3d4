//! The kinds of guests, and which of them this host supports.

use std::fmt;

use anyhow::Context;
use clap::ValueEnum;
use test_machine::Need;

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
    pub fn best() -> anyhow::Result<(Self, Vec<String>)> {
        let mut why_not = Vec::new();
        for kind in Self::value_variants() {
            match kind.available() {
                Ok(()) => return Ok((*kind, why_not)),
                Err(error) => why_not.push(format!("{error:#}")),
            }
        }
        anyhow::bail!("no kind of guest is available: {}", why_not.join("; "))
    }

    /// Returns the capability that a machine must have, or `None` if every machine has it.
    pub fn need(self) -> Option<Need> {
        match self {
            Self::Kvm => Some(Need::Kvm),
            Self::Hvf => Some(Need::Hypervisor),
            Self::Userfaultfd => Some(Need::Userfaultfd),
            Self::Mprotect => None,
        }
    }

    /// Returns whether this system can have this kind of guest.
    pub const fn is_supported(self) -> bool {
        match self {
            Self::Kvm => cfg!(all(target_os = "linux", target_arch = "x86_64")),
            Self::Hvf => cfg!(any(
                all(target_os = "macos", target_arch = "aarch64"),
                hvf_fake
            )),
            Self::Userfaultfd => cfg!(target_os = "linux"),
            Self::Mprotect => true,
        }
    }

    /// Creates a guest of this kind with empty memory.
    pub fn create(self, layout: Layout) -> anyhow::Result<Box<dyn Guest>> {
        let guest: anyhow::Result<Box<dyn Guest>> = match self {
            #[cfg(all(target_os = "linux", target_arch = "x86_64"))]
            Self::Kvm => super::kvm::Machine::new(layout).map(|guest| Box::new(guest) as _),
            #[cfg(any(all(target_os = "macos", target_arch = "aarch64"), hvf_fake))]
            Self::Hvf => super::hvf::Machine::new(layout).map(|guest| Box::new(guest) as _),
            #[cfg(target_os = "linux")]
            Self::Userfaultfd => {
                Embedded::new(layout, Tracking::Userfaultfd).map(|guest| Box::new(guest) as _)
            }
            Self::Mprotect => {
                Embedded::new(layout, Tracking::Mprotect).map(|guest| Box::new(guest) as _)
            }
            // The kinds of other systems.
            #[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
            Self::Kvm => Err(self.of_other_system()),
            #[cfg(not(any(all(target_os = "macos", target_arch = "aarch64"), hvf_fake)))]
            Self::Hvf => Err(self.of_other_system()),
            #[cfg(not(target_os = "linux"))]
            Self::Userfaultfd => Err(self.of_other_system()),
        };
        guest.with_context(|| format!("failed to create a guest in {self}"))
    }

    /// Checks that this host supports this kind of guest.
    fn available(self) -> anyhow::Result<()> {
        match self {
            #[cfg(all(target_os = "linux", target_arch = "x86_64"))]
            Self::Kvm => super::kvm::available(),
            #[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
            Self::Kvm => Err(self.of_other_system()),
            #[cfg(any(all(target_os = "macos", target_arch = "aarch64"), hvf_fake))]
            Self::Hvf => super::hvf::available(),
            #[cfg(not(any(all(target_os = "macos", target_arch = "aarch64"), hvf_fake)))]
            Self::Hvf => Err(self.of_other_system()),
            #[cfg(target_os = "linux")]
            Self::Userfaultfd => {
                let _ = write_faults::open_userfaultfd()?;
                Ok(())
            }
            #[cfg(not(target_os = "linux"))]
            Self::Userfaultfd => Err(self.of_other_system()),
            Self::Mprotect => Ok(()),
        }
    }

    /// Returns why this system cannot have this kind of guest.
    #[cfg_attr(hvf_fake, allow(dead_code, reason = "it has all of them"))]
    fn of_other_system(self) -> anyhow::Error {
        anyhow::anyhow!(match self {
            Self::Kvm => "KVM guests require Linux on x86-64",
            Self::Hvf => "the Hypervisor framework requires macOS on Apple silicon",
            Self::Userfaultfd => "userfaultfd requires Linux",
            Self::Mprotect => "mprotect requires Unix",
        })
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_is_created_or_refused_with_a_reason() {
        for kind in Kind::value_variants() {
            let available = kind.available().is_ok();
            assert!(kind.is_supported() || !available, "{kind}");
            assert_eq!(
                kind.create(Layout::of(8 << 20)).is_ok(),
                available,
                "{kind}"
            );
        }
    }

    #[test]
    fn the_best_kind_is_the_first_that_is_available() {
        let (best, why_not) = Kind::best().unwrap();
        let mut better = Kind::value_variants()
            .iter()
            .take_while(|kind| **kind != best);
        assert!(better.all(|kind| kind.available().is_err()));
        let place = Kind::value_variants().iter().position(|kind| *kind == best);
        assert_eq!(place, Some(why_not.len()));
    }
}
