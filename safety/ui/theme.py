"""Colours, fonts and launch options: everything offline, nothing tracked, no public endpoints."""

from typing import Any

import gradio as gr

from safety.ui.board import STATIC
from safety.ui.presets import FOLDER

_SANS = (
    "Inter",
    "ui-sans-serif",
    "system-ui",
    "-apple-system",
    "Segoe UI",
    "Roboto",
    "Noto Sans",
    "Liberation Sans",
    "sans-serif",
)
_MONO = ("ui-monospace", "SF Mono", "Cascadia Mono", "Roboto Mono", "DejaVu Sans Mono", "monospace")
MAX_UPLOAD = "32mb"
STYLES = ("board", "editor", "story", "page")  # the page's own rules for small screens come last


def theme() -> gr.themes.Base:
    """The page's theme. Fonts are names of installed ones only: nothing is fetched."""
    both = {
        "body_background_fill": ("#f4f5f7", "#0f1318"),
        "body_text_color": ("#17212b", "#e6eaee"),
        "body_text_color_subdued": ("#55616d", "#9aa7b3"),
        "background_fill_primary": ("#ffffff", "#171d24"),
        "background_fill_secondary": ("#f4f5f7", "#12171d"),
        "block_background_fill": ("#ffffff", "#171d24"),
        "block_border_color": ("#dfe3e8", "#2a333d"),
        "block_label_text_color": ("#55616d", "#9aa7b3"),
        "block_title_text_color": ("#17212b", "#e6eaee"),
        "block_info_text_color": ("#55616d", "#9aa7b3"),
        "border_color_primary": ("#dfe3e8", "#2a333d"),
        "input_background_fill": ("#ffffff", "#12171d"),
        "input_border_color": ("#c9d0d8", "#36414d"),
        "input_border_color_focus": ("#0072b2", "#56b4e9"),
        "slider_color": ("#0072b2", "#56b4e9"),
        "color_accent_soft": ("#e5f1f8", "#16303f"),
        "checkbox_background_color_selected": ("#0072b2", "#2b8fca"),
        "checkbox_border_color_selected": ("#0072b2", "#2b8fca"),
        "button_primary_background_fill": ("#0072b2", "#2b8fca"),
        "button_primary_background_fill_hover": ("#005f95", "#56b4e9"),
        "button_primary_text_color": ("#ffffff", "#06121b"),
        "button_secondary_background_fill": ("#ffffff", "#1d252e"),
        "button_secondary_border_color": ("#c9d0d8", "#36414d"),
    }
    settings: dict[str, Any] = {}
    for key, (light, dark) in both.items():
        settings[key], settings[f"{key}_dark"] = light, dark
    return gr.themes.Base(primary_hue="blue", neutral_hue="slate", font=_SANS, font_mono=_MONO).set(
        block_radius="10px",
        block_shadow="none",
        block_border_width="1px",
        button_large_radius="8px",
        input_radius="8px",
        button_primary_border_color="transparent",
        **settings,
    )


def launch_options() -> dict[str, Any]:
    """What `Blocks.launch` needs beside host and port."""
    return {
        "theme": theme(),
        "css": "\n".join((STATIC / f"{name}.css").read_text("utf-8") for name in STYLES),
        "footer_links": [],
        "run_history": False,
        "share": False,
        "mcp_server": False,
        "enable_monitoring": False,
        "pwa": False,
        "ssr_mode": False,
        # Gradio would ask itself for the page and give up unless it answers in 3 s: a busy laptop or a proxy may not.
        "_frontend": False,
        "max_file_size": MAX_UPLOAD,
        "allowed_paths": [str(FOLDER)],
        "favicon_path": str(FOLDER.parent / "favicon.png"),
        "app_kwargs": {"docs_url": None, "redoc_url": None, "openapi_url": None},
    }
