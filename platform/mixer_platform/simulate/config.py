"""What the simulated marketplace looks like: every rate has a name, a default and one line on what it does."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, model_validator


class ClickConfig(BaseModel):
    """Demand, the incumbent engine, the position-based click model and the faults of one set of logs."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sessions_per_query: float = Field(5.0, gt=0, description="mean number of result pages for a query photo")
    demand_ratio: float = Field(30.0, ge=1, description="demand for the most over the least wanted thing (Zipf's law)")
    weeks: int = Field(4, ge=1, description="weeks of logs, one part each")

    page_size: int = Field(12, ge=1, description="items on a result page")
    pool_size: int = Field(40, ge=1, description="candidates that the engine ranks for a query photo")
    engine_recall: float = Field(0.93, ge=0, le=1, description="chance that the engine knows a right item of a photo")
    engine_precision: float = Field(0.5, gt=0, le=1, description="a right item's rank is geometric with this chance")
    engine_noise: float = Field(0.5, ge=0, description="noise of a photo's ranking, in deviations of the similarity")
    page_noise: float = Field(0.15, ge=0, description="further noise of each result page, in the same unit")

    screen_size: int = Field(3, ge=1, description="items that show at once; only items on screen are logged")
    scroll: float = Field(0.25, ge=0, le=1, description="chance to go on to the next screen; at 1 all pages are whole")
    examination_exponent: float = Field(0.7, ge=0, description="chance to examine is (1 + position)^-this")
    click_probability: float = Field(0.8, gt=0, le=1, description="click chance of the most clickable item examined")
    click_noise: float = Field(0.36, ge=0, lt=1, description="expected share of people's clicks on wrong items")
    related_appeal: float = Field(3.0, ge=1, description="click chance of a related over an unrelated wrong item")
    cart_right: float = Field(0.3, ge=0, le=1, description="chance that a click on a right item is followed by a cart")
    cart_wrong: float = Field(0.05, ge=0, le=1, description="the same for a click on a wrong item")
    purchase_given_cart: float = Field(0.5, ge=0, le=1, description="chance that an item in the cart is bought")
    dwell_right_ms: float = Field(9000.0, gt=0, description="median time on a right item after a click")
    dwell_wrong_ms: float = Field(3500.0, gt=0, description="median time on a wrong item after a click")
    dwell_sigma: float = Field(0.9, ge=0, description="log-normal deviation of both times")

    bot_share: float = Field(0.003, ge=0, le=1, description="bot sessions for each session of a person")
    bot_pages: int = Field(3, ge=1, description="result pages in a bot session")
    bot_click: float = Field(0.4, ge=0, le=1, description="chance that a bot clicks an item, whatever it is")
    fault_rate: float = Field(0.014, ge=0, lt=0.5, description="share of rows that are broken or repeated")

    @model_validator(mode="after")
    def _pool_fills_a_page(self) -> ClickConfig:
        if self.pool_size < self.page_size:
            raise ValueError(
                f"pool_size {self.pool_size} cannot fill a page: make it at least page_size, {self.page_size}"
            )
        return self


class SimulateConfig(BaseModel):
    """The whole marketplace: catalogue, query photos and logs, all drawn from one seed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    seed: int = Field(0, ge=0, description="every draw follows from it")
    max_things: int | None = Field(None, ge=2, description="use this many things, drawn at random; all when unset")
    photos_per_drawing: int = Field(2, ge=1, description="query photos in the logs for each thing and style")
    val_photos: int = Field(800, ge=1, description="new photos in val.parquet; no thing has two before all have one")
    photo_size: int = Field(256, ge=32, description="width and height of a query photo in pixels")
    item_size: int = Field(224, ge=32, description="width and height of a catalogue picture in pixels")
    without_description: float = Field(0.4, ge=0, le=1, description="share of items that have a title only")
    broken_pictures: int = Field(3, ge=0, description="items whose picture is missing, truncated or not an image")
    clicks: ClickConfig = ClickConfig()

    @model_validator(mode="after")
    def _something_to_photograph(self) -> SimulateConfig:
        if self.max_things and self.max_things <= self.broken_pictures:
            raise ValueError(
                f"max_things {self.max_things} leaves no item with a picture to ask for: make it more than "
                f"broken_pictures, {self.broken_pictures}"
            )
        return self
