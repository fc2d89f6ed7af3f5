//! The hub's doorbell.

fn main() -> std::process::ExitCode {
    opa_hub::app::main()
}
