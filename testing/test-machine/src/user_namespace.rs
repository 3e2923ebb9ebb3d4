//! Processes in a user namespace.

use std::fs;
use std::io::Write as _;
use std::process::{Command, Output, Stdio};
use std::thread;
use std::time::Duration;

/// Runs `command` as `user`, with the group of the same number, in a new user namespace with this
/// map of users and groups (see `user_namespaces(7)`); an empty map maps none.
///
/// Call it as root. The command must be accessible to the user.
///
/// # Panics
/// Panics if the namespace cannot be created or mapped.
#[must_use]
pub fn in_user_namespace(command: &Command, user: u32, map: &str) -> Output {
    let mut inside = Command::new("setpriv");
    inside.args([
        &format!("--reuid={user}"),
        &format!("--regid={user}"),
        "--clear-groups",
    ]);
    inside.args([
        "unshare",
        "-U",
        "sh",
        "-c",
        "read -r _ && exec \"$@\"",
        "sh",
    ]);
    inside.arg(command.get_program()).args(command.get_args());
    for (key, value) in command.get_envs() {
        match value {
            Some(value) => inside.env(key, value),
            None => inside.env_remove(key),
        };
    }
    inside.current_dir(command.get_current_dir().unwrap_or("/".as_ref()));
    inside
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = inside.spawn().expect("start setpriv");
    // setpriv, unshare and sh are one process.
    let process = format!("/proc/{}", child.id());
    let own = fs::read_link("/proc/self/ns/user").expect("a user namespace");
    while fs::read_link(format!("{process}/ns/user")).is_ok_and(|now| now == own) {
        if child.try_wait().expect("a child").is_some() {
            break;
        }
        thread::sleep(Duration::from_millis(1));
    }
    if !map.is_empty() {
        for file in ["uid_map", "gid_map"] {
            fs::write(format!("{process}/{file}"), map).expect("map the ids");
        }
    }
    let mut stdin = child.stdin.take().expect("a pipe");
    stdin.write_all(b"\n").expect("let the command begin");
    drop(stdin);
    child.wait_with_output().expect("the output of the command")
}
