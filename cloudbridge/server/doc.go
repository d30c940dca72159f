// Package server is the cloud side as one process: the bridge, the embedded
// broker with its listeners and logins, and the HTTP endpoints for probes and
// metrics. The command fairlead-cloud is flags around it.
//
//	err := server.Run(ctx, server.Config{Kubeconfig: file, Data: dir, MQTT: []string{":1883"}})
//
// With Config.Broker set there is no embedded broker: the bridge is a client of
// that one, which then decides itself who may log in.
package server
