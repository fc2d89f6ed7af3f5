//! Starts the hub.

fn main() -> std::process::ExitCode {
    opa_hub::app::main()
}
