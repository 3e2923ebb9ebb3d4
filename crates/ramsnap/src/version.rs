//! The text of `--version`.

use std::sync::LazyLock;

use image_format::{Layout, Version};
use sparse_file::Engine;

/// The commit of a release, which `cargo xtask dist` sets.
const COMMIT: Option<&str> = option_env!("RAMSNAP_COMMIT");

/// The version, the commit, the image formats and the engines.
pub static LONG: LazyLock<String> = LazyLock::new(|| {
    let layouts = Layout::ALL.map(Layout::name).join(", ");
    let engines: Vec<_> = Engine::ALL.iter().map(|engine| name(*engine)).collect();
    format!(
        "{}\ncommit: {}\nimage formats: {layouts}; written as {:?}, older ones are read\n\
         engines: {}\ntarget: {}-{}",
        env!("CARGO_PKG_VERSION"),
        COMMIT.unwrap_or("unknown, as this is not a build of `cargo xtask dist`"),
        Version::CURRENT,
        engines.join(", "),
        std::env::consts::ARCH,
        std::env::consts::OS,
    )
});

fn name(engine: Engine) -> String {
    format!("{engine:?}").to_lowercase()
}
