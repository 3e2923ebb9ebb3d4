//! xtask runs programs. It links no crate of the product, directly or through another crate.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

/// Returns the directories, relative to the workspace, of the workspace's crates that `package` is
/// built from, on any platform.
fn linked_by(package: &str) -> BTreeSet<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let root = root.canonicalize().expect("the workspace");
    // Without the crates of the registry: those for other platforms may not be there.
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version=1", "--no-deps", "--offline"])
        .current_dir(&root)
        .output()
        .expect("cargo runs");
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}");
    let metadata: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let packages = metadata["packages"].as_array().expect("packages");
    let directory = |package: &Value| {
        let manifest = package["manifest_path"].as_str().expect("a path");
        Path::new(manifest)
            .parent()
            .expect("a directory")
            .to_owned()
    };

    let first = packages.iter().find(|found| found["name"] == package);
    let mut queue = vec![directory(first.expect("the package"))];
    let mut linked = BTreeSet::new();
    while let Some(next) = queue.pop() {
        let package = packages.iter().find(|package| directory(package) == next);
        let package = package.expect("a crate of the workspace");
        if !linked.insert(next.strip_prefix(&root).expect("a crate").to_owned()) {
            continue;
        }
        let dependencies = package["dependencies"].as_array().expect("dependencies");
        // Those of tests and examples alone are of kind "dev".
        let linked = dependencies.iter().filter(|found| found["kind"] != "dev");
        queue.extend(linked.filter_map(|found| found["path"].as_str().map(PathBuf::from)));
    }
    linked
}

#[test]
fn xtask_links_no_crate_of_the_product() {
    let linked = linked_by("xtask");
    assert!(linked.contains(Path::new("testing/harness")), "{linked:?}");
    let of_product = |path: &&PathBuf| path.starts_with("crates") || path.starts_with("benches");
    assert_eq!(linked.iter().find(of_product), None, "{linked:?}");
}

#[test]
fn a_program_that_links_the_product_is_recognized() {
    let linked = linked_by("demo");
    let below = Path::new("crates/sparse-file");
    assert!(linked.contains(below), "{linked:?}");
}
