//! Compiles the normative `proto/fairvault.proto` into Rust, without an external `protoc`.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto/fairvault.proto");
    let descriptors = protox::compile(["proto/fairvault.proto"], ["proto"])?;
    prost_build::Config::new().compile_fds(descriptors)?;
    Ok(())
}
