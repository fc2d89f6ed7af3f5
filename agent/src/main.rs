//! Entry point of the agent.

fn main() -> std::process::ExitCode {
    opa_hub_agent::app::main()
}
