"""A page to talk with Moshi in the browser, by FastRTC.

    pip install "moshi_c[fastrtc]"
    python examples/fastrtc_page.py
    python examples/fastrtc_page.py --model FOLDER --port 7860

Each visitor has a call of their own with the same model. The page shows what the model says.
"""

import argparse

import gradio
from fastrtc import Stream

import moshi_c
from moshi_c.integrations.fastrtc import MoshiHandler


def show(shown: str, facts: dict) -> str:
    """The text on the page after one more fact of the conversation."""
    if facts["type"] == "text":
        return shown + facts["text"]
    if facts["type"] == "reply":
        return shown + "\n"
    if facts["type"] == "error":
        return f"{shown}\n({facts['error']})\n"
    return shown


def page(model: moshi_c.Model) -> Stream:
    """The page, not yet served."""
    return Stream(
        MoshiHandler(model),
        modality="audio",
        mode="send-receive",
        concurrency_limit=8,
        additional_outputs=[gradio.Textbox(label="Moshi", lines=8)],
        additional_outputs_handler=show,
        ui_args={"title": "Moshi"},
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder or hub id (default: the model in the package)")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=7860)
    arguments = parser.parse_args()
    with moshi_c.load(arguments.model, max_sessions=8) as model:
        page(model).ui.launch(server_name=arguments.host, server_port=arguments.port)


if __name__ == "__main__":
    main()
