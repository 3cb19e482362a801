//! linux.seccomp: what a profile lets through, and where in a process's making it begins to count.

use std::{fs, os::unix::fs::PermissionsExt};

use caisson_protos::agent::CreateRequest;
use serde_json::{Value, json};
use ttrpc::Code;

use crate::{
    namespaces::join,
    support::{Pod, exec_shell, request, shell, spec, status},
};

/// 128 + SIGSYS.
const KILLED: u32 = 159;

/// What containerd 1.6.20 writes for `ctr run --seccomp`.
fn runtime_default() -> Value {
    serde_json::from_str(include_str!("../runtime-default.json")).unwrap()
}

fn with_profile(mut spec: Value, profile: Value) -> Value {
    spec["linux"]["seccomp"] = profile;
    spec
}

fn allow_but(rules: Value) -> Value {
    json!({"defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_X86_64"], "syscalls": rules})
}

/// Adds CAP_SYS_ADMIN, so that what is refused is refused by the filter.
fn with_admin(mut spec: Value) -> Value {
    for set in ["bounding", "effective", "permitted"] {
        spec["process"]["capabilities"][set].as_array_mut().unwrap().push(json!("CAP_SYS_ADMIN"));
    }
    spec
}

#[tokio::test]
async fn the_profile_of_containerd_loads_and_holds() {
    let pod = Pod::start().await;
    let script = "mount -t tmpfs tmpfs /tmp && echo mounted; hostname changed && echo renamed; \
                  awk '/^Seccomp/ {print}' /proc/self/status; yes | head -c 100000 | sha256sum | wc -l; \
                  (sleep 0; exit 3); exit $?";
    let free = pod.run(&with_admin(shell(script))).await;
    assert!(free.stdout.starts_with("mounted\nrenamed\nSeccomp:\t0\n"), "{free:?}");
    for no_new_privileges in [true, false] {
        let mut spec = with_profile(with_admin(shell(script)), runtime_default());
        spec["process"]["noNewPrivileges"] = json!(no_new_privileges);
        let held = pod.run(&spec).await;
        assert_eq!(held.stdout, "Seccomp:\t2\nSeccomp_filters:\t1\n1\n", "{held:?}");
        assert_eq!(
            held.stderr.matches("Operation not permitted").count() + held.stderr.matches("denied").count(),
            2,
            "{held:?}"
        );
        assert_eq!(held.status, 3);
    }
    pod.assert_empty();
}

/// The filter has to be loaded before the exec gives up its rights, and it enters the pid namespace, by a clone, after that.
#[tokio::test]
async fn who_enters_a_pid_namespace_of_others_without_no_new_privileges_needs_clone() {
    let pod = Pod::start().await;
    let names = ["clone", "clone3", "fork", "vfork"];
    let profile = allow_but(json!([{"names": names, "action": "SCMP_ACT_ERRNO", "errnoRet": 1}]));
    pod.create("c", &with_profile(spec(&["sleep", "1000"]), profile.clone()), None).await.unwrap();
    pod.start_process("c", "").await.unwrap();
    let mut process = exec_shell("exit 3");
    process["noNewPrivileges"] = json!(true);
    assert_eq!(pod.run_exec("c", "e", &process).await.status, 3);
    process["noNewPrivileges"] = json!(false);
    pod.exec("c", "f", &process, None).await.unwrap();
    let (code, message) = status(pod.start_process("c", "f").await);
    assert_eq!(code, Code::INVALID_ARGUMENT, "{message}");
    assert!(message.contains("linux.seccomp must allow clone"), "{message}");

    let mut second = with_profile(shell("exit 3"), profile);
    let joins = join(&mut second, &["pid"], "c");
    let request = |spec: &Value| CreateRequest { joins: joins.clone(), ..request("second", spec) };
    assert_eq!(pod.run_request(request(&second)).await.status, 3);
    second["process"]["noNewPrivileges"] = json!(false);
    let (code, message) = status(pod.create_request(request(&second)).await);
    assert_eq!(code, Code::INVALID_ARGUMENT, "{message}");
    assert!(message.contains("linux.seccomp must allow clone"), "{message}");
}

#[tokio::test]
async fn an_exec_has_its_containers_filter() {
    let pod = Pod::start().await;
    let profile = allow_but(json!([{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 28}]));
    pod.create("c", &with_profile(shell("exec sleep 1000"), profile), None).await.unwrap();
    pod.start_process("c", "").await.unwrap();
    for no_new_privileges in [true, false] {
        let mut process = exec_shell("mkdir /tmp/new; awk '/^(Seccomp:|NoNewPrivs)/ {print $2}' /proc/self/status");
        process["noNewPrivileges"] = json!(no_new_privileges);
        let output = pod.run_exec("c", "e", &process).await;
        assert_eq!(output.stdout, format!("{}\n2\n", u8::from(no_new_privileges)), "{output:?}");
        assert!(output.stderr.contains("No space left on device"), "{output:?}");
    }
}

#[tokio::test]
async fn each_action_is_the_kernels() {
    let pod = Pod::start().await;
    for (action, expected) in [
        ("SCMP_ACT_KILL", KILLED),
        ("SCMP_ACT_KILL_THREAD", KILLED),
        ("SCMP_ACT_KILL_PROCESS", KILLED),
        ("SCMP_ACT_TRAP", KILLED),
        ("SCMP_ACT_ERRNO", 1),
        ("SCMP_ACT_TRACE", 1),
        ("SCMP_ACT_LOG", 0),
        ("SCMP_ACT_ALLOW", 0),
    ] {
        // A rule that says what the default says would be none.
        let default = if action == "SCMP_ACT_LOG" { "SCMP_ACT_ALLOW" } else { "SCMP_ACT_LOG" };
        let profile = json!({"defaultAction": default, "syscalls": [{"names": ["mkdir"], "action": action}]});
        let output = pod.run(&with_profile(spec(&["mkdir", &format!("/tmp/{action}")]), profile)).await;
        assert_eq!(output.status, expected, "{action}: {output:?}");
    }
}

#[tokio::test]
async fn arguments_are_looked_at() {
    let pod = Pod::start().await;
    // Neither set-user-ID bits nor modes of exactly 600.
    let profile = allow_but(json!([
        {"names": ["chmod"], "action": "SCMP_ACT_ERRNO", "errnoRet": 30, "args": [
            {"index": 1, "value": 0o4000, "valueTwo": 0o4000, "op": "SCMP_CMP_MASKED_EQ"}]},
        {"names": ["chmod"], "action": "SCMP_ACT_ERRNO", "errnoRet": 28, "args": [
            {"index": 1, "value": 0o600, "op": "SCMP_CMP_EQ"}]},
    ]));
    let script = "cd /tmp; touch f; chmod 755 f && echo plain; chmod 4755 f; chmod 600 f; chmod 601 f && echo other";
    let output = pod.run(&with_profile(shell(script), profile)).await;
    assert_eq!(output.stdout, "plain\nother\n", "{output:?}");
    assert!(output.stderr.contains("Read-only file system"), "{output:?}");
    assert!(output.stderr.contains("No space left on device"), "{output:?}");
}

#[tokio::test]
async fn with_no_new_privs_the_filter_comes_last_and_without_before_privileges_go() {
    let pod = Pod::start().await;
    // What only the stage does.
    let profile = allow_but(json!([
        {"names": ["capset", "setgroups", "setgid", "sendmsg", "openat2", "close_range"],
         "action": "SCMP_ACT_KILL_PROCESS"},
    ]));
    let mut spec = with_profile(spec(&["true"]), profile);
    assert_eq!(pod.run(&spec).await.status, 0);
    spec["process"]["noNewPrivileges"] = json!(false);
    let (code, message) = status(pod.create("c", &spec, None).await);
    assert_eq!(code, Code::INTERNAL, "{message}");
    pod.assert_empty();
}

#[tokio::test]
async fn what_is_not_understood_is_refused_before_anything_exists() {
    let pod = Pod::start().await;
    let spec = with_profile(spec(&["true"]), json!({"defaultAction": "SCMP_ACT_NOTIFY"}));
    let (code, message) = status(pod.create("c", &spec, None).await);
    assert_eq!(code, Code::INVALID_ARGUMENT);
    assert!(message.contains("linux.seccomp.defaultAction") && message.contains("SCMP_ACT_NOTIFY"), "{message}");
    pod.assert_empty();
}

/// A static program that makes one system call and ends with the low byte of what it returned.
fn program(call: &[u8]) -> Vec<u8> {
    let exit = [0x89, 0xc7, 0xb8, 60, 0, 0, 0, 0x0f, 0x05]; // mov edi, eax; mov eax, exit; syscall
    let code = [call, &exit].concat();
    let (base, headers) = (0x40_0000u64, 64 + 56u64);
    let size = headers + code.len() as u64;
    let mut elf = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    elf.extend(2u16.to_le_bytes()); // an executable
    elf.extend(62u16.to_le_bytes()); // for x86-64
    elf.extend(1u32.to_le_bytes());
    // Entry, program header, no sections.
    [base + headers, 64, 0].iter().for_each(|word| elf.extend(word.to_le_bytes()));
    elf.extend(0u32.to_le_bytes());
    [64u16, 56, 1, 0, 0, 0].iter().for_each(|half| elf.extend(half.to_le_bytes()));
    elf.extend(1u32.to_le_bytes()); // loaded
    elf.extend(5u32.to_le_bytes()); // readable and executable
    [0, base, base, size, size, 0x1000].iter().for_each(|word| elf.extend(word.to_le_bytes()));
    elf.extend(code);
    elf
}

/// `mov eax, number; syscall`, or by the door of 32-bit programs `int 0x80`.
fn call(number: u32, door: [u8; 2]) -> Vec<u8> {
    [&[0xb8][..], &number.to_le_bytes(), &door].concat()
}

#[tokio::test]
async fn other_doors_into_the_kernel_are_shut_unless_they_are_listed() {
    let pod = Pod::start().await;
    let (syscall, int80) = ([0x0f, 0x05], [0xcd, 0x80]);
    // getpid is 39, for 32-bit programs 20, with the bit of x32 0x40000027. 5 is neither EPERM nor ENOSYS.
    let getpid = json!([{"names": ["getpid"], "action": "SCMP_ACT_ERRNO", "errnoRet": 5}]);
    let minimal = json!([{"names": ["execve", "exit", "exit_group", "getpid"], "action": "SCMP_ACT_ALLOW"}]);
    let errno = |number: u8| u32::from(number.wrapping_neg());
    let all = json!(["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"]);
    let one = json!(["SCMP_ARCH_X86_64"]);
    for (what, code, architectures, default, rules, expected) in [
        ("native", call(39, syscall), &one, "SCMP_ACT_ALLOW", &getpid, errno(5)),
        ("32-bit, listed", call(20, int80), &all, "SCMP_ACT_ALLOW", &getpid, errno(5)),
        ("32-bit, allowed", call(20, int80), &all, "SCMP_ACT_ERRNO", &minimal, 1),
        ("32-bit, not listed", call(20, int80), &one, "SCMP_ACT_ALLOW", &getpid, KILLED),
        ("x32, listed", call(0x4000_0027, syscall), &all, "SCMP_ACT_ALLOW", &getpid, errno(5)),
        ("x32, not listed", call(0x4000_0027, syscall), &one, "SCMP_ACT_ALLOW", &getpid, KILLED),
        ("not allowed", call(102, syscall), &all, "SCMP_ACT_ERRNO", &minimal, errno(1)),
        ("newer than the profile", call(600, syscall), &all, "SCMP_ACT_ERRNO", &minimal, errno(38)),
        ("newer, 32-bit", call(600, int80), &all, "SCMP_ACT_KILL", &minimal, errno(38)),
    ] {
        let path = pod.rootfs().join("bin/probe");
        let _ = fs::remove_file(&path);
        fs::write(&path, program(&code)).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        let profile = json!({"defaultAction": default, "architectures": architectures, "syscalls": rules});
        let output = pod.run(&with_profile(spec(&["/bin/probe"]), profile)).await;
        assert_eq!(output.status, expected, "{what}: {output:?}");
    }
}
