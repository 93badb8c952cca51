"""What deploy/ gives to Prometheus and Grafana: events that FLARE has, the exporter's names, queries that parse."""

import json
import re

import promql_parser
import pytest
import yaml
from nvflare.apis.event_type import EventType

from tests.federation import DEPLOY, REPOSITORY

DASHBOARD = json.loads((DEPLOY / "monitoring" / "grafana_dashboard.json").read_text())
ALERTS = yaml.safe_load((DEPLOY / "monitoring" / "alerts.yml").read_text())
RULES = [rule for group in ALERTS["groups"] for rule in group["rules"]]
QUERIES = [t["expr"] for p in DASHBOARD["panels"] for t in p["targets"]] + [rule["expr"] for rule in RULES]


def test_events_are_flare_s_and_go_by_the_exporter_s_names() -> None:
    events = {v for k, v in vars(EventType).items() if k.isupper()} | {"_job"}
    named = {event for query in QUERIES for event in re.findall(r'event="([^"]+)"', query)}
    assert len(named) >= 5
    assert named <= events
    mapping = yaml.safe_load((DEPLOY / "monitoring" / "statsd_mapping.yml").read_text())["mappings"]
    for metric, name, event in (
        ("_client_heartbeat_received_count", "flare_events_total", "_client_heartbeat_received"),
        ("_job_time_taken", "flare_seconds", "_job"),
    ):
        rule = next(m for m in mapping if re.fullmatch(m["match"], metric))
        assert rule["name"] == name
        assert re.sub(rule["match"], rule["labels"]["event"].replace("$", "\\"), metric) == event


@pytest.mark.parametrize("query", QUERIES)
def test_prometheus_can_read_every_query(query: str) -> None:
    promql_parser.parse(query)
    with pytest.raises(ValueError):
        promql_parser.parse(f"{query})")


def test_a_server_that_never_heard_of_a_site_is_an_alert_too() -> None:
    """Before the first heartbeat there is no series that could be 0."""
    (heartbeat,) = [rule["expr"] for rule in RULES if rule["alert"] == "NoHeartbeat"]
    assert "or absent(" in heartbeat


def test_files_that_monitoring_names_are_there() -> None:
    assert all((REPOSITORY / rule["annotations"]["runbook"]).exists() for rule in RULES)
    prometheus = yaml.safe_load((DEPLOY / "monitoring" / "prometheus.yml").read_text())
    assert all((DEPLOY / "monitoring" / name).exists() for name in prometheus["rule_files"])
