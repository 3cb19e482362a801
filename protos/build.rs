//! Generates the agent's messages and its async ttrpc client and server from `proto/agent.proto`, without protoc.

use std::{env, fs::OpenOptions, io::Write, path::PathBuf};

use ttrpc_codegen::{Codegen, Customize, ProtobufCustomize};

fn main() {
    println!("cargo::rerun-if-changed=proto/agent.proto");
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    Codegen::new()
        .out_dir(&out)
        .input("proto/agent.proto")
        .include("proto")
        .rust_protobuf()
        .rust_protobuf_customize(ProtobufCustomize::default().gen_mod_rs(true))
        .customize(Customize { async_all: true, ..Customize::default() })
        .run()
        .expect("proto/agent.proto compiles");
    // The generated mod.rs names the message modules only; the service's module stands beside them.
    let mut modules = OpenOptions::new().append(true).open(out.join("mod.rs")).expect("the generator wrote mod.rs");
    writeln!(modules, "\npub mod agent_ttrpc;").expect("mod.rs can be extended");
}
