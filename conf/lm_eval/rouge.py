"""What xlsum_en.yaml is judged by."""

from typing import Any

from rouge_score.rouge_scorer import RougeScorer

_SCORER = RougeScorer(["rougeL"], use_stemmer=True)


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """F-measure of ROUGE-L of a summary, times 100."""
    return {"rougeL": 100 * _SCORER.score(doc["summary"], results[0])["rougeL"].fmeasure}
