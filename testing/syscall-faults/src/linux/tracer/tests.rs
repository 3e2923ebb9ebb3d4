use super::*;

#[test]
fn a_child_that_does_not_end_is_ended() {
    let mut command = Command::new("sleep");
    command.arg("300");
    let trace = trace(command, None, None, Duration::from_millis(100)).expect("a trace");
    assert_eq!(trace.end, End::Hung);
}

#[test]
fn a_trace_reports_how_the_child_ended() {
    let of = |script: &str| {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        trace(command, None, None, Duration::from_secs(60))
            .expect("a trace")
            .end
    };
    assert_eq!(of("exit 3"), End::Exited(3));
    assert_eq!(of("kill -ABRT $$"), End::Killed(Signal::SIGABRT));
}
