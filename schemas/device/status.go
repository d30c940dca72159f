package device

import (
	"encoding/json"
	"time"
)

// State is how a device is doing, as Kubernetes sees it. The first three are
// the mapper's words (payload.DeviceOnline and so on); the others are
// cloudbridge's, for what no mapper can know.
type State string

// The states of a device in its status.
const (
	StateOnline       State = "Online"       // every property that is read was read
	StateOffline      State = "Offline"      // nothing could be read
	StateError        State = "Error"        // it answers, but not for every property
	StateUnknown      State = "Unknown"      // nothing was reported yet
	StateNodeOffline  State = "NodeOffline"  // the link to the node is down, values are the last ones
	StateModelMissing State = "ModelMissing" // spec.model names no DeviceModel
	StateInvalid      State = "Invalid"      // the device does not fit its model, see Status.Message
)

// Status is the status of a Device: a conflated mirror of the bus. Only
// PropertyStatus.Desired is memory as well, see there.
//
// Times are UTC; [At] makes one from the milliseconds of a payload.
type Status struct {
	// ObservedGeneration is the metadata.generation the status is about.
	ObservedGeneration int64  `json:"observedGeneration,omitempty"`
	State              State  `json:"state,omitempty"`
	Message            string `json:"message,omitempty"`
	// Protocol is the model's.
	Protocol string `json:"protocol,omitempty"`
	// LastReportTime is when the last report about the device was made on its node.
	LastReportTime time.Time `json:"lastReportTime,omitzero"`
	// Conditions holds one condition, Ready, which is True while the state is Online.
	Conditions []Condition `json:"conditions,omitempty"`
	// Properties are keyed by name.
	Properties []PropertyStatus `json:"properties,omitempty"`
}

// ConditionReady is the type of a device's only condition.
const ConditionReady = "Ready"

// Condition has the JSON of a metav1.Condition, which this package must not import.
type Condition struct {
	Type               string    `json:"type"`
	Status             string    `json:"status"` // True, False or Unknown
	Reason             string    `json:"reason"`
	Message            string    `json:"message"`
	LastTransitionTime time.Time `json:"lastTransitionTime"`
	ObservedGeneration int64     `json:"observedGeneration,omitempty"`
}

// PropertyStatus is one property as it was last reported.
type PropertyStatus struct {
	Name string `json:"name"`
	// Value is absent where the quality is bad.
	Value json.RawMessage `json:"value,omitempty"`
	Unit  string          `json:"unit,omitempty"`
	// Time is when the source produced the value or noticed the bad quality.
	Time time.Time `json:"time,omitzero"`
	// Quality is absent where it is good.
	Quality string `json:"quality,omitempty"`
	// LastValue is the last good value, where the quality is bad.
	LastValue json.RawMessage `json:"lastValue,omitempty"`
	Desired   *DesiredStatus  `json:"desired,omitempty"`
	Target    *TargetStatus   `json:"target,omitempty"`
}

// DesiredStatus is what the cloud wants of a property. Value and Rev are also
// cloudbridge's memory of which rev it gave to which value of spec.desired, so
// they must survive every other change of the status. A nil Value is null: a
// merge patch cannot carry null.
type DesiredStatus struct {
	Value json.RawMessage `json:"value"`
	Rev   int64           `json:"rev"`
	// Acked tells that the mapper has finished with the wish, with or without an error.
	Acked bool   `json:"acked,omitempty"`
	Error string `json:"error,omitempty"`
}

// TargetStatus is what the node drives a property to.
type TargetStatus struct {
	Value json.RawMessage `json:"value"`
	Rev   int64           `json:"rev"`
	By    string          `json:"by"` // payload.ByCloud or payload.ByLocal
	Who   string          `json:"who,omitempty"`
}

// At gives the time of a payload's milliseconds, as the status writes it.
func At(millis int64) time.Time { return time.UnixMilli(millis).UTC() }
