//! The agent's doorbell.

fn main() -> std::process::ExitCode {
    opa_hub_agent::app::main()
}
